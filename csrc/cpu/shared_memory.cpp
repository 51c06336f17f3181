// Exchanges between processes of one machine: each copies what it has into memory that all have
// mapped, raises a flag, and reads what the others have put there once their flags are up. Nothing
// is sent, nobody is woken.
//
// Two slots. A rank has two, which take turns, and waits for nobody before it writes one. None is
// overwritten while it is read: who puts data for s + 2 has seen every flag at s + 1 or later, and
// a rank raises its flag to s + 1 only after it has read what was put for s, since its reads come
// before the store (release) that the other's load (acquire) has seen. So whoever waits for s finds
// no other rank beyond s + 1, and the sizes of s as they were.
//
// Traffic. Of n ranks each writes its b bytes once and reads the n b of all of them, from the
// caches of the cores that wrote them as long as they fit. Floor: a line that goes from core to
// core and back, some 0.2 us; the calls of Python around it take longer. A flag that is polled
// stays in the poller's cache until it is written, so that polling costs the others nothing.
//
// Waiting. Ranks compute equal parts and mostly come within microseconds: the flag is polled, at
// first with the core kept, then with the core offered to others (there may be more ranks than
// cores, and whoever is waited for may want this one), and after two milliseconds between sleeps,
// of which one too many costs a tenth. On two cores that a dozen other processes wanted as well,
// nine exchanges with a millisecond of work before each took two ranks 47 ms and four 115; with the
// core kept for 300 us 52 and 126, for a millisecond 53 and 150, and through gloo 60 and 177.
#include <sched.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace {

// Of one rank, which alone writes it; by itself on a cache line and on the next, which is fetched
// along.
struct alignas(128) Flag {
  std::atomic<uint64_t> sequence;  // of the last exchange whose data lies in a slot; 0: none
  int64_t sizes[2];                // of the last exchanges, by sequence % 2
};
static_assert(sizeof(Flag) == 128 && std::atomic<uint64_t>::is_always_lock_free);

using std::chrono::microseconds;
constexpr microseconds kKept(50), kOffered(2000);
constexpr timespec kSleep{0, 50000};

void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");  // "yield" does nothing on most cores
#endif
}

}  // namespace

// Copies `bytes` of data into a slot of this rank, and raises its flag.
//
// sequence: 1 in the first exchange, and one more in each that follows, on every rank alike.
// size: what all ranks of an exchange have to say alike, such as the most bytes of one.
extern "C" __attribute__((visibility("default"))) void mllama_kernels_shared_memory_put(
    Flag* flag, uint64_t sequence, void* slot, const void* data, int64_t bytes, int64_t size) {
  if (bytes > 0) memcpy(slot, data, bytes);
  flag->sizes[sequence % 2] = size;
  flag->sequence.store(sequence, std::memory_order_release);
}

// Waits until the flags of all ranks are up, no longer than so many microseconds.
//
// polls: false where it has been waited already, so that polling has not helped.
// Returns: -1 when they are; a rank whose flag is not; ranks + one that has come with another size.
extern "C" __attribute__((visibility("default"))) int64_t mllama_kernels_shared_memory_wait(
    const Flag* flags, int64_t ranks, uint64_t sequence, int64_t size, int64_t most, bool polls) {
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const Flag& flag = flags[rank];
    while (flag.sequence.load(std::memory_order_acquire) < sequence) {
      const auto waited = std::chrono::steady_clock::now() - begin;
      if (waited >= microseconds(most)) return rank;
      if (polls && waited < kKept) {
        pause_core();
      } else if (polls && waited < kOffered) {
        sched_yield();
      } else {
        nanosleep(&kSleep, nullptr);
      }
    }
    if (flag.sizes[sequence % 2] != size) return ranks + rank;
  }
  return -1;
}
