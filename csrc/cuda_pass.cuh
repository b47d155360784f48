// Common parts of the two kernels of the pass: the work list and the reduction of a fragment to candidate records.
#pragma once

#include "cuda_machine.cuh"
#include "cuda_shared.h"

namespace tmm {

struct Pass {
  const uint16_t* rows;   // [num_rows, width] fp16
  const uint16_t* codes;  // [padded_codes, width] fp16
  Record* records;        // [num_rows, segments, kLanes]
  int num_rows, width, tiles, segments, segment_tiles, row_tiles;
};

// Units of work: one row tile against one segment. Row tiles run fastest, so that blocks at work share the codes in
// L2.
struct Unit {
  int row_tile, segment, first_tile, last_tile;

  __device__ Unit(const Pass& pass, int unit)
      : row_tile(unit % pass.row_tiles),
        segment(unit / pass.row_tiles),
        first_tile(segment * pass.segment_tiles),
        last_tile(min(first_tile + pass.segment_tiles, pass.tiles)) {}
};

// The largest of the kGroup values that a thread holds of one row and one span: value(j, p) for j < 8, p < 2, as
// float bits.
template <class Value>
__device__ __forceinline__ int group_maximum(const Value& value) {
  int largest = max(value(0, 0), value(0, 1));
#pragma unroll
  for (int j = 1; j < 8; ++j) largest = max3(largest, value(j, 0), value(j, 1));
  return largest;
}

__device__ __forceinline__ void write_record(const Pass& pass, int row, int segment, const Record& record) {
  if (row >= pass.num_rows) return;
  const int64_t at = (static_cast<int64_t>(row) * pass.segments + segment) * kLanes + threadIdx.x % 4;
  *reinterpret_cast<int4*>(pass.records + at) = make_int4(record.best, record.second, record.group, 0);
}

}  // namespace tmm
