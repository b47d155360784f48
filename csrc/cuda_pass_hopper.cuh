// The pass on compute capability 9.0: wgmma.m64n256k16 fed by the bulk tensor copy engine. One producer thread keeps
// kStages stages in flight; two consumer warpgroups of 64 rows each multiply and reduce, free to drift apart by the
// depth of the pipeline, so that one reduces while the other multiplies.
#pragma once

#include "cuda_pass.cuh"

namespace tmm::hopper {

constexpr int kThreads = 384;      // producer, consumer, consumer
constexpr int kConsumerWarps = 8;
constexpr int kDepth = 64;         // columns of a stage: 128 bytes, the swizzle's width
constexpr int kStages = 4;
constexpr int kRowBytes = kRowTile * kDepth * 2;
constexpr int kStageBytes = kRowBytes + kTile * kDepth * 2;
// Room to align the stages to the swizzle's 1024-byte pattern, then the stages, then two barriers for each.
constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + 16);

#if TMM_MACHINE_HAS_WGMMA

// A K-major operand with the 128-byte swizzle: address, leading offset (unused by this layout), 1024 bytes between
// groups of 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

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

// 16 * steps columns of the next stage. It is handed back as soon as its products are done; meanwhile the other
// consumer's products keep the matrix unit busy.
template <int steps>
__device__ __forceinline__ void multiply_stage(float (&acc)[128], uint32_t stages, uint32_t full, uint32_t empty,
                                               int group, Cursor& cursor, int add) {
  barrier_wait(full + cursor.stage * 8, cursor.phase);
  const uint64_t rows = descriptor(stages + cursor.stage * kStageBytes + group * (kRowBytes / 2));
  const uint64_t codes = descriptor(stages + cursor.stage * kStageBytes + kRowBytes);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < steps; ++k) wgmma(acc, rows + k * 2, codes + k * 2, k > 0 ? 1 : add);  // 32 bytes per step
  wgmma_end(acc);
  if (threadIdx.x % 32 == 0) barrier_arrive(empty + cursor.stage * 8);
  cursor.advance();
}

// Fills the stages, unit by unit, tile by tile, chunk by chunk. One thread.
__device__ __forceinline__ void produce(const Pass& pass, const CUtensorMap& row_map, const CUtensorMap& code_map,
                                        uint32_t stages, uint32_t full, uint32_t empty) {
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

// Multiplies and reduces the same sequence of stages. `group` is 0 or 1; `tail` counts the 16-column steps of the
// last chunk.
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

#endif  // TMM_MACHINE_HAS_WGMMA

template <int tail>
__global__ void __launch_bounds__(kThreads, 1)
search_pass(Pass pass, const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap code_map) {
#if TMM_MACHINE_HAS_WGMMA
  const uint32_t stages = (shared_memory() + 1023) & ~1023u;
  const uint32_t full = stages + kStages * kStageBytes;
  const uint32_t empty = full + kStages * 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_release<40>();
    if (threadIdx.x == 0) produce(pass, row_map, code_map, stages, full, empty);
  } else {
    registers_claim<232>();
    consume<tail>(pass, stages, full, empty, threadIdx.x / 128 - 1);
  }
#endif
}

}  // namespace tmm::hopper
