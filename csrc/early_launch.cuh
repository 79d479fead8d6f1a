// A kernel that begins while the one before it in its stream ends. Until `await_the_one_before` it must write nothing,
// and not read what any kernel writes since the last one that was launched as usual: those before it may have begun
// early, too. Every thread has to call it, as the kernels behind count on that.
#pragma once
#ifndef SPEEDK_EMULATED
#include <cuda_runtime.h>

namespace speedk {

// The next kernel's blocks may take the room that this one's leave.
__device__ __forceinline__ void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// No effect where the kernel was launched as usual.
__device__ __forceinline__ void await_the_one_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launch `kernel`; `early`: so that it may begin before the one before it has ended, on GPUs that can.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t bytes, cudaStream_t stream, bool early,
           const Arguments&... arguments) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute allowed{};
  allowed.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  allowed.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = dim3(threads), how.dynamicSmemBytes = bytes, how.stream = stream;
  how.attrs = &allowed, how.numAttrs = early && major >= 9 ? 1 : 0;
  const cudaError_t code = cudaLaunchKernelEx(&how, kernel, Parameters(arguments)...);
  return static_cast<int>(code == cudaSuccess ? code : cudaGetLastError());
}

}  // namespace speedk
#endif
