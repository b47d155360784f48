// After the pass: score in double precision what the certificate could not rule out. A warp is four quads of kParts
// lanes, each working on one code; the shares of a distance are added in the order that distance_share documents.
#pragma once

#include "cuda_pack.cuh"

namespace tmm {

constexpr int kFallbackRows = 4;
constexpr int kTeams = kPackThreads / kParts;

__device__ __forceinline__ double team_distance(const Points& tokens, int64_t row, const Points& codes, int64_t code) {
  double share = distance_share(tokens, row, codes, code, threadIdx.x % kParts);
  for (int step = kParts / 2; step > 0; step >>= 1) share += __shfl_xor_sync(kAllLanes, share, step);
  return share;
}

// The smaller of (distance, index) over the warp, in every lane.
__device__ __forceinline__ void warp_best(double& distance, int64_t& index) {
  for (int step = 16; step >= kParts; step >>= 1) {
    const double other = __shfl_xor_sync(kAllLanes, distance, step);
    const int64_t other_index = __shfl_xor_sync(kAllLanes, static_cast<long long>(index), step);
    if (better(other, other_index, distance, index)) {
      distance = other;
      index = other_index;
    }
  }
}

struct Search {
  Points tokens, codes;
  int64_t first;       // token of row 0
  int64_t num_codes;
  int num_rows, streams, segments, segment_tiles, tiles;
  const uint8_t* valid;
  const RowBound* bounds;
  const Record* records;  // [rows, segments, lanes]
  double* best;           // [rows]
  int32_t* list;          // a count, then rows for the exact launch
  int64_t* ids;           // of all tokens
  double* distances;      // of all tokens, or null
};

// Scores the codes of one group and keeps the best so far, alike in all lanes of the warp.
__device__ __forceinline__ void warp_score_group(const Search& search, int row, int group, double& best,
                                                 int64_t& best_index) {
  for (int round = 0; round < kGroup; round += 32 / kParts) {
    const int64_t code = static_cast<int64_t>(group) * kGroup + round + threadIdx.x % 32 / kParts;
    const bool real = code < search.num_codes && search.valid[code];
    const double distance = team_distance(search.tokens, search.first + row, search.codes, real ? code : 0);
    if (real && better(distance, code, best, best_index)) {
      best = distance;
      best_index = code;
    }
  }
  warp_best(best, best_index);
}

__device__ __forceinline__ void write_answer(const Search& search, int row, double distance, int64_t index) {
  search.ids[search.first + row] = index == kNoCode ? 0 : index;
  if (search.distances) search.distances[search.first + row] = index == kNoCode ? NAN : distance;
}

// One warp per row: score the best group, then every stream's best group that the threshold still allows. A row in
// which a stream's second best value is allowed too goes on the list.
__global__ void __launch_bounds__(kPackThreads) finish_rows(Search search, bool exact_only) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= search.num_rows) return;
  const RowBound bound = search.bounds[row];
  double best = INFINITY;
  int64_t best_index = kNoCode;
  if (bound.status == kNotFinite) {
    if (lane == 0) write_answer(search, row, INFINITY, kNoCode);
    return;
  }
  bool incomplete = true;
  if (bound.status == kCertified && !exact_only) {
    const Record* records = search.records + static_cast<int64_t>(row) * search.streams;
    // The stream with the largest value; the lowest stream among equals.
    int top_value = -1, top = 0;
    for (int stream = lane; stream < search.streams; stream += 32) {
      const int value = records[stream].best;
      if (value > top_value) {
        top_value = value;
        top = stream;
      }
    }
    for (int step = 16; step > 0; step >>= 1) {
      const int value = __shfl_xor_sync(kAllLanes, top_value, step);
      const int stream = __shfl_xor_sync(kAllLanes, top, step);
      if (value > top_value || (value == top_value && stream < top)) {
        top_value = value;
        top = stream;
      }
    }
    warp_score_group(search, row, records[top].group, best, best_index);
    double limit = threshold(bound, best, search.tokens.dim);
    for (int begin = 0; begin < search.streams; begin += 32) {
      const int stream = begin + lane;
      Record record;
      record_clear(record);
      if (stream < search.streams && stream != top) record = records[stream];
      unsigned open = __ballot_sync(kAllLanes, reaches(record.best, limit));
      while (open) {
        const int source = __ffs(open) - 1;
        open &= open - 1;
        const int value = __shfl_sync(kAllLanes, record.best, source);
        const int group = __shfl_sync(kAllLanes, record.group, source);
        if (!reaches(value, limit)) continue;  // ruled out by a group scored meanwhile
        warp_score_group(search, row, group, best, best_index);
        limit = threshold(bound, best, search.tokens.dim);
      }
    }
    bool again = false;
    for (int stream = lane; stream < search.streams; stream += 32) {
      again = again || reaches(records[stream].second, limit);
    }
    incomplete = __any_sync(kAllLanes, again);
  }
  if (lane == 0) {
    search.best[row] = best;
    write_answer(search, row, best, best_index);
    if (incomplete) search.list[1 + atomicAdd(search.list, 1)] = row;
  }
}

// The exact launch over the listed rows, kFallbackRows per block: every code of every stream that one of the rows
// still allows. The order of the list varies from run to run; the answers do not, being minima over (distance,
// index).
__global__ void __launch_bounds__(kPackThreads) finish_listed(Search search, bool exact_only) {
  __shared__ uint8_t open[kMaxSegments * kLanes];
  __shared__ double distances[kWarps][kFallbackRows];
  __shared__ int64_t indices[kWarps][kFallbackRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int team = threadIdx.x / kParts;
  const int count = search.list[0];
  for (int begin = blockIdx.x * kFallbackRows; begin < count; begin += gridDim.x * kFallbackRows) {
    int rows[kFallbackRows];
    double best[kFallbackRows];
    int64_t index[kFallbackRows];
#pragma unroll
    for (int r = 0; r < kFallbackRows; ++r) {  // a short last set repeats its last row
      rows[r] = search.list[1 + min(begin + r, count - 1)];
      best[r] = search.best[rows[r]];
      index[r] = best[r] < INFINITY ? search.ids[search.first + rows[r]] : kNoCode;
    }
    for (int stream = threadIdx.x; stream < search.streams; stream += kPackThreads) {
      bool any = exact_only;
#pragma unroll
      for (int r = 0; r < kFallbackRows; ++r) {
        const RowBound bound = search.bounds[rows[r]];
        any = any || bound.status == kExact ||
              reaches(search.records[static_cast<int64_t>(rows[r]) * search.streams + stream].second,
                      threshold(bound, best[r], search.tokens.dim));
      }
      open[stream] = any;
    }
    __syncthreads();
    for (int stream = 0; stream < search.streams; ++stream) {
      if (!open[stream]) continue;
      const int first_tile = stream / kLanes * search.segment_tiles;
      const int last_tile = min(first_tile + search.segment_tiles, search.tiles);
      const int stream_codes = (last_tile - first_tile) * (kTile / kLanes);
      for (int step = 0; step < stream_codes; step += kTeams) {
        // The stream's codes: kGroup consecutive ones out of every kSpan.
        const int at = step + team;
        const int64_t code =
            static_cast<int64_t>(first_tile) * kTile + at / kGroup * kSpan + stream % kLanes * kGroup + at % kGroup;
        const bool real = at < stream_codes && code < search.num_codes && search.valid[code];
#pragma unroll
        for (int r = 0; r < kFallbackRows; ++r) {
          const double distance = team_distance(search.tokens, search.first + rows[r], search.codes, real ? code : 0);
          if (real && better(distance, code, best[r], index[r])) {
            best[r] = distance;
            index[r] = code;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kFallbackRows; ++r) {
      warp_best(best[r], index[r]);
      if (lane == 0) {
        distances[warp][r] = best[r];
        indices[warp][r] = index[r];
      }
    }
    __syncthreads();
    if (threadIdx.x < kFallbackRows && begin + static_cast<int>(threadIdx.x) < count) {
      const int r = threadIdx.x;
      double distance = distances[0][r];
      int64_t winner = indices[0][r];
      for (int other = 1; other < kWarps; ++other) {
        if (better(distances[other][r], indices[other][r], distance, winner)) {
          distance = distances[other][r];
          winner = indices[other][r];
        }
      }
      write_answer(search, search.list[1 + begin + r], distance, winner);
    }
    __syncthreads();
  }
}

}  // namespace tmm
