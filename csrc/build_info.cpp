#include "build_info.h"

#define MLLAMA_TEXT_OF(x) #x
#define MLLAMA_TEXT(x) MLLAMA_TEXT_OF(x)

#ifndef MLLAMA_CUDA_ARCHS
#define MLLAMA_CUDA_ARCHS
#endif
#ifndef MLLAMA_CUDA_VERSION
#define MLLAMA_CUDA_VERSION
#endif
#ifdef MLLAMA_SIMULATE
#define MLLAMA_SIMULATED true
#else
#define MLLAMA_SIMULATED false
#endif

extern "C" const char* mllama_kernels_build_info() {
  return "{\"compiler\": \"" __VERSION__
         "\", \"cuda\": \"" MLLAMA_TEXT(MLLAMA_CUDA_VERSION) "\", \"cuda_archs\": \"" MLLAMA_TEXT(
             MLLAMA_CUDA_ARCHS) "\", \"simulated\": " MLLAMA_TEXT(MLLAMA_SIMULATED) "}";
}
