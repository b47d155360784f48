// The pass on compute capability 9.0: wgmma.m64n256k16 fed by the bulk tensor copy engine. One producer thread keeps kStages
// stages in flight; two consumer warpgroups of 64 rows each multiply and reduce, free to drift apart by the depth of the pipeline, so
// that one reduces while the other multiplies.
#pragma once

#include <cuda.h>

#include "cuda_pass.cuh"

namespace tmm::hopper {

constexpr int kThreads = 384;      // producer, consumer, consumer
constexpr int kConsumerWarps = 8;
constexpr int kDepth = 64;         // columns of a stage: 128 bytes, the swizzle's width
constexpr int kStages = 4;
constexpr int kRowBytes = kRowTile * kDepth * 2;
constexpr int kStageBytes = kRowBytes + kTile * kDepth * 2;
constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // room to align the stages to the swizzle's 1024-byte pattern

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
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

// A K-major operand with the 128-byte swizzle: address, leading offset (unused by this layout), 1024 bytes between groups of 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

#define TMM_F8(n) "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9"
#define TMM_A8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
                  "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define TMM_A64(i) TMM_A8(i), TMM_A8(i + 8), TMM_A8(i + 16), TMM_A8(i + 24), TMM_A8(i + 32), TMM_A8(i + 40), TMM_A8(i + 48), \
                   TMM_A8(i + 56)

// acc[64 x 256 fragment] = rows[64, 16] codes[256, 16]^T + (add ? acc : 0). Asynchronous.
__device__ __forceinline__ void multiply(float (&acc)[128], uint64_t rows, uint64_t codes, int add) {
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

// A place in the ring of stages and the parity of its turn.
struct Cursor {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// 16 * steps columns of the next stage. It is handed back as soon as its products are done; meanwhile the other consumer's
// products keep the matrix unit busy.
template <int steps>
__device__ __forceinline__ void multiply_stage(float (&acc)[128], uint32_t stages, uint32_t full, uint32_t empty, int group,
                                               Cursor& cursor, int add) {
  barrier_wait(full + cursor.stage * 8, cursor.phase);
  const uint64_t rows = descriptor(stages + cursor.stage * kStageBytes + group * (kRowBytes / 2));
  const uint64_t codes = descriptor(stages + cursor.stage * kStageBytes + kRowBytes);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < steps; ++k) multiply(acc, rows + k * 2, codes + k * 2, k > 0 ? 1 : add);  // 32 bytes per step
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if (threadIdx.x % 32 == 0) barrier_arrive(empty + cursor.stage * 8);
  cursor.advance();
}

// Fills the stages, unit by unit, tile by tile, chunk by chunk. One thread.
__device__ __forceinline__ void produce(const Pass& pass, const CUtensorMap& row_map, const CUtensorMap& code_map, uint32_t stages,
                                        uint32_t full, uint32_t empty) {
  const int chunks = (pass.width + kDepth - 1) / kDepth;
  const int units = pass.row_tiles * pass.segments;
  Cursor cursor;
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit(pass, index);
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t to = stages + cursor.stage * kStageBytes;
        const uint32_t ready = full + cursor.stage * 8;
        barrier_wait(empty + cursor.stage * 8, cursor.phase ^ 1);
        barrier_expect(ready, kStageBytes);  // counts the zeros beyond the matrix too
        copy_tile(to, row_map, chunk * kDepth, unit.row_tile * kRowTile, ready);
        copy_tile(to + kRowBytes, code_map, chunk * kDepth, tile * kTile, ready);
        cursor.advance();
      }
    }
  }
}

// Multiplies and reduces the same sequence of stages. `group` is 0 or 1; `tail` counts the 16-column steps of the last chunk.
template <int tail>
__device__ __forceinline__ void consume(const Pass& pass, uint32_t stages, uint32_t full, uint32_t empty, int group) {
  const int chunks = (pass.width + kDepth - 1) / kDepth;
  const int units = pass.row_tiles * pass.segments;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  Cursor cursor;
  float acc[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) acc[i] = 0.0f;
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit(pass, index);
    Record records[2];  // rows lane / 4 and lane / 4 + 8 of the warp's 16
    record_clear(records[0]);
    record_clear(records[1]);
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      for (int chunk = 0; chunk + 1 < chunks; ++chunk) {
        multiply_stage<kDepth / 16>(acc, stages, full, empty, group, cursor, chunk > 0);
      }
      multiply_stage<tail>(acc, stages, full, empty, group, cursor, chunks > 1);
#pragma unroll
      for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // no read of acc moves above the wait
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int span = 0; span < kTile / kSpan; ++span) {
          const int value =
              group_maximum([&](int j, int p) { return __float_as_int(acc[(span * 8 + j) * 4 + half * 2 + p]); });
          record_add(records[half], value, (tile * (kTile / kSpan) + span) * kLanes + lane % 4);
        }
      }
    }
    const int row = unit.row_tile * kRowTile + group * 64 + warp * 16 + lane / 4;
    write_record(pass, row, unit.segment, records[0]);
    write_record(pass, row + 8, unit.segment, records[1]);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int tail>
__global__ void __launch_bounds__(kThreads, 1)
search_pass(Pass pass, const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap code_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t stages = (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) & ~1023u;
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  const uint32_t empty = full + kStages * 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce(pass, row_map, code_map, stages, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<tail>(pass, stages, full, empty, threadIdx.x / 128 - 1);
  }
#endif
}

}  // namespace tmm::hopper
