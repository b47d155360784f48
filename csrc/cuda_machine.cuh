// The instructions that C++ does not have, one function each. A test replaces this file by a model of the machine
// (TMM_MACHINE) and runs the kernels on the host, so nothing here decides anything.
#pragma once

#if defined(TMM_MACHINE)
#include TMM_MACHINE
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TMM_MACHINE_HAS_WGMMA 1
#else
#define TMM_MACHINE_HAS_WGMMA 0
#endif

namespace tmm {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Address of the dynamic shared memory.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The largest of three, one instruction from 9.0 on.
__device__ __forceinline__ int max3(int a, int b, int c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return __vimax3_s32(a, b, c);
#else
  return max(max(a, b), c);
#endif
}

// ---- compute capability 8.0 ---------------------------------------------------------------------------------------

// Asynchronous copy of 16 bytes to shared memory; zeros if not `inside`.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lanes 8 i .. 8 i + 7 give the rows of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// acc[16, 8] += a[16, 16] b[8, 16]^T, fragments as the instruction defines them.
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- compute capability 9.0a --------------------------------------------------------------------------------------

#if TMM_MACHINE_HAS_WGMMA

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity; the phase before the first counts as ended with parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, int col, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}

#define TMM_F8(n) "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9"
#define TMM_A8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
                  "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define TMM_A64(i) TMM_A8(i), TMM_A8(i + 8), TMM_A8(i + 16), TMM_A8(i + 24), TMM_A8(i + 32), TMM_A8(i + 40), \
                   TMM_A8(i + 48), TMM_A8(i + 56)

// acc[64 x 256 fragment] = rows[64, 16] codes[256, 16]^T + (add ? acc : 0). Asynchronous.
__device__ __forceinline__ void wgmma(float (&acc)[128], uint64_t rows, uint64_t codes, int add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TMM_F8(1) ", " TMM_F8(2) ", " TMM_F8(3) ", " TMM_F8(4) ", " TMM_F8(5) ", "
      TMM_F8(6) ", " TMM_F8(7) ", " TMM_F8(8) ", " TMM_F8(9) ", " TMM_F8(10) ", " TMM_F8(11) ", "
      "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, add, 1, 1, 0, 0;\n"
      "}"
      : TMM_A64(0), TMM_A64(64)
      : "l"(rows), "l"(codes), "r"(add));
}

#undef TMM_F8
#undef TMM_A8
#undef TMM_A64

// Before the first product of a group: orders the registers of acc and the shared memory before it.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Waits for the products since wgmma_begin.
__device__ __forceinline__ void wgmma_end(float (&acc)[128]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // no read of acc moves above the wait
}

template <int count>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

#endif  // TMM_MACHINE_HAS_WGMMA

}  // namespace tmm

#endif  // TMM_MACHINE
