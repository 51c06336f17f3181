// The machine and this process, as far as the kernels ask.
#pragma once

#include "../../common.h"

namespace mllama {

#ifdef MLLAMA_X86
bool amx_available();  // tiles of bfloat16 and bytes, on this machine and for this process
#endif
int64_t last_cache_bytes();         // of the cache before memory, as much as the threads reach
[[noreturn]] void out_of_memory();  // throws std::bad_alloc

}  // namespace mllama
