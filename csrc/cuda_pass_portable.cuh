// The pass on any tensor core from compute capability 8.0: mma.m16n8k16, ldmatrix, a cp.async pipeline.
#pragma once

#include "cuda_pass.cuh"

namespace tmm::portable {

constexpr int kThreads = 128;      // 4 warps, each 32 rows x 128 codes
constexpr int kCodes = 128;        // codes of a step; two steps per kTile
constexpr int kDepth = 32;         // columns of a step: rows of 64 bytes in shared memory
constexpr int kStages = 4;
constexpr int kRowBytes = kRowTile * kDepth * 2;
constexpr int kStageBytes = kRowBytes + kCodes * kDepth * 2;
constexpr int kSharedBytes = kStages * kStageBytes;

// Byte offset of 16-byte block `block` (0..3) of row `row`. Two rows share 128 bytes; the exclusive or spreads the
// eight rows that one ldmatrix phase reads over all banks.
__device__ __forceinline__ int place(int row, int block) { return row * 64 + ((block ^ ((row >> 1) & 3)) << 4); }

// One stage: kRowTile rows and kCodes codes, columns chunk * kDepth ...; beyond the matrix, zeros.
__device__ __forceinline__ void load_stage(const Pass& pass, uint32_t stage, int first_row, int64_t first_code,
                                           int chunk) {
#pragma unroll
  for (int i = 0; i < (kRowTile + kCodes) * 4 / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x;
    const bool is_row = i < kRowTile * 4 / kThreads;  // known when unrolled
    const int row = is_row ? index / 4 : index / 4 - kRowTile;
    const int block = index % 4;
    const int col = chunk * kDepth + block * 8;
    const int64_t from_row = is_row ? static_cast<int64_t>(first_row + row) : first_code + row;
    const bool inside = col < pass.width && (!is_row || from_row < pass.num_rows);
    const uint16_t* matrix = is_row ? pass.rows : pass.codes;
    const uint32_t to = stage + (is_row ? 0 : kRowBytes) + place(row, block);
    copy16(to, matrix + (inside ? from_row * pass.width + col : 0), inside);
  }
}

__global__ void __launch_bounds__(kThreads, 2) search_pass(Pass pass) {
  const uint32_t base = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunks = (pass.width + kDepth - 1) / kDepth;
  const int units = pass.row_tiles * pass.segments;

  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit(pass, index);
    const int first_row = unit.row_tile * kRowTile;
    const int64_t first_code = static_cast<int64_t>(unit.first_tile) * kTile;
    const int steps = (unit.last_tile - unit.first_tile) * (kTile / kCodes) * chunks;

    Record records[4];  // rows lane / 4 + 8 h of the warp's two fragments
#pragma unroll
    for (int r = 0; r < 4; ++r) record_clear(records[r]);
    float acc[2][kCodes / 8][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < kCodes / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.0f;
      }
    }

    // Stages are requested kStages - 1 steps ahead; every step commits one copy group, empty at the end.
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) {
        load_stage(pass, base + step * kStageBytes, first_row, first_code + step / chunks * kCodes, step % chunks);
      }
      copy_commit();
    }
    int chunk = 0;
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncthreads();  // this step's stage is complete for all, and all are done with the previous step's
      const int ahead = step + kStages - 1;
      if (ahead < steps) {
        load_stage(pass, base + ahead % kStages * kStageBytes, first_row, first_code + ahead / chunks * kCodes,
                   ahead % chunks);
      }
      copy_commit();

      const uint32_t stage = base + step % kStages * kStageBytes;
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        if (chunk * kDepth + k * 16 >= pass.width) break;
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {  // matrices: rows 0-7 | 8-15 of the fragment, columns 0-7, then 8-15
          load_matrices(a[m], stage + place(warp * 32 + m * 16 + lane % 16, k * 2 + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kCodes / 8; j += 2) {  // matrices: codes 0-7, columns 0-7 | 8-15, then codes 8-15
          uint32_t b[4];
          load_matrices(b, stage + kRowBytes + place(j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma(acc[m][j], a[m], b[0], b[1]);
            mma(acc[m][j + 1], a[m], b[2], b[3]);
          }
        }
      }

      if (++chunk < chunks) continue;
      chunk = 0;
      const int first_span = unit.first_tile * (kTile / kSpan) + step / chunks * (kCodes / kSpan);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int span = 0; span < kCodes / kSpan; ++span) {
            const int value =
                group_maximum([&](int j, int p) { return __float_as_int(acc[m][span * 8 + j][half * 2 + p]); });
            record_add(records[m * 2 + half], value, (first_span + span) * kLanes + lane % 4);
          }
        }
#pragma unroll
        for (int j = 0; j < kCodes / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      write_record(pass, first_row + warp * 32 + r / 2 * 16 + r % 2 * 8 + lane / 4, unit.segment, records[r]);
    }
    __syncthreads();  // the next unit overwrites the stages
  }
}

}  // namespace tmm::portable
