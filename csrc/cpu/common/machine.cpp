// What Linux says of the machine, and of this process.
#include <stdio.h>
#include <stdlib.h>

#ifdef MLLAMA_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <new>

#include "machine.h"

namespace mllama {
namespace {

// The cache before memory, as Linux describes it. glibc's sysconf() counts every such cache of the
// machine, also those that the threads of this process do not reach: 320 MB for the 32 MB of a
// virtual machine with two cores.
struct Cache {
  int64_t bytes;
  int64_t sharers;  // cores
};

// The line that the system has of a cache of the first core, "" if there is none.
struct Line {
  char text[4096] = "";

  Line(int index, const char* name) {
    char path[96];
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, name);
    if (FILE* file = fopen(path, "r")) {
      if (fgets(text, sizeof(text), file) == nullptr) text[0] = '\0';
      fclose(file);
    }
  }
};

// From a size like "32768K".
int64_t bytes_of(const char* text) {
  char* unit;
  const int64_t number = strtoll(text, &unit, 10);
  return number << (*unit == 'K' ? 10 : *unit == 'M' ? 20 : 0);
}

// From a mask of cores like "00000000,0000000f".
int64_t cores_of(const char* text) {
  int64_t cores = 0;
  for (; *text; ++text) {
    const char digit[2] = {*text, '\0'};
    cores += __builtin_popcountl(strtoul(digit, nullptr, 16));
  }
  return cores;
}

Cache find() {
  Cache last = {32LL << 20, 1LL << 20};  // where the system does not tell
  for (int index = 0;; ++index) {        // the last one is the largest
    const Line size(index, "size"), map(index, "shared_cpu_map");
    const Cache cache = {bytes_of(size.text), cores_of(map.text)};
    if (cache.bytes <= 0 || cache.sharers <= 0) return last;
    last = cache;
  }
}

#ifdef MLLAMA_X86
bool request_amx() {
#ifdef __linux__
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux gives a process its tiles on request.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAll = kBf16 | kTile | kInt8;
  if ((edx & kAll) != kAll) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

int64_t last_cache_bytes() {
  static const char* const wanted = getenv("MLLAMA_KERNELS_CPU_CACHE");  // bytes, for tests
  if (wanted != nullptr) return atoll(wanted);
  static const Cache cache = find();
  return cache.bytes * ceil_div(num_threads(), cache.sharers);
}

#ifdef MLLAMA_X86
bool amx_available() {
  static const bool available = request_amx();
  return available;
}
#endif

void out_of_memory() { throw std::bad_alloc(); }

}  // namespace mllama
