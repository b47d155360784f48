// After the pass: score in double precision what the certificate could not rule out. A warp is four teams of kParts
// lanes, each working on kEach codes at a time; the shares of a distance are added in the order that distance_shares
// documents.
#pragma once

#include "cuda_pack.cuh"

namespace tmm {

constexpr int kSetRows = 2;    // listed rows of a set, where there are many: they share the loads of codes
constexpr int kEach = 4;       // codes of a team at a time
constexpr int kTeams = kPackThreads / kParts;
constexpr int kStep = kTeams * kEach;  // codes of a block at a time
constexpr int kFewSplits = 16, kManySplits = 256;  // blocks of a row at most: with records, and where all codes count

template <class T, int rows>
__device__ __forceinline__ void team_distances(const Points& tokens, const int64_t (&row)[rows], const Points& codes,
                                               const int64_t (&code)[kEach], double (&distance)[rows][kEach]) {
  distance_shares<T>(tokens, row, codes, code, threadIdx.x % kParts, distance);
#pragma unroll
  for (int step = kParts / 2; step > 0; step >>= 1) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) distance[r][c] += __shfl_xor_sync(kAllLanes, distance[r][c], step);
    }
  }
}

// The bests of all teams merged, alike in every lane.
template <bool margin>
__device__ __forceinline__ void warp_best(Best& best, const Points& codes) {
  for (int step = 16; step >= kParts; step >>= 1) {
    Best other = no_best();
    other.distance = __shfl_xor_sync(kAllLanes, best.distance, step);
    other.code = __shfl_xor_sync(kAllLanes, static_cast<long long>(best.code), step);
    if (margin) other.second = __shfl_xor_sync(kAllLanes, best.second, step);
    best_merge<margin>(best, codes, other);
  }
}

struct Search {
  Points tokens, codes;
  int64_t first;       // token of row 0
  int64_t num_codes;
  int num_rows, streams, segments, segment_tiles, tiles;
  bool exact_only;
  const RowBound* bounds;
  const Record* records;  // [rows, segments, lanes]
  Best* best;             // [rows]
  Best* partial;          // [kPartials], of listed rows that several blocks share
  int32_t* finished;      // [kSplitRows], how many of those blocks are done
  int32_t* list;          // a count, then rows for the exact launch
  const uint64_t* packed_hash;
  const uint64_t* found_hash;  // null: the codes are known to be the packed ones
  int64_t* ids;           // of all tokens
  double* distances;      // of all tokens, or null
  double* margins;        // of all tokens, or null
  tmm_cuda_faults* faults;  // or null

  // The pass ran on other codes: its records say nothing.
  __device__ bool stale() const { return found_hash && *found_hash != *packed_hash; }
};

// Scores kEach codes from `first` on against some rows, by the team that calls; the same in all its lanes.
template <class T, bool margin, int rows>
__device__ __forceinline__ void team_score(const Search& search, const int (&row)[rows], int64_t first, bool real,
                                           Best (&best)[rows]) {
  int64_t token[rows], code[kEach];
  double distance[rows][kEach];
#pragma unroll
  for (int r = 0; r < rows; ++r) token[r] = search.first + row[r];
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = real && first + c < search.num_codes ? first + c : 0;
  team_distances<T>(search.tokens, token, search.codes, code, distance);
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    if (!real || first + c >= search.num_codes) continue;
#pragma unroll
    for (int r = 0; r < rows; ++r) best_add<margin>(best[r], search.codes, distance[r][c], code[c]);
  }
}

// Scores the codes of one group and keeps the best so far, alike in all lanes of the warp.
template <class T, bool margin>
__device__ __forceinline__ void warp_score_group(const Search& search, int row, int group, Best& best) {
  static_assert(kGroup == kEach * 32 / kParts, "a group is what a warp scores at a time");
  const int rows[1] = {row};
  Best bests[1] = {best};
  team_score<T, margin>(search, rows, static_cast<int64_t>(group) * kGroup + threadIdx.x % 32 / kParts * kEach, true,
                        bests);
  best = bests[0];
  warp_best<margin>(best, search.codes);
}

__device__ __forceinline__ void write_answer(const Search& search, int row, const Best& best) {
  const int64_t at = search.first + row;
  search.ids[at] = best.code == kNoCode ? 0 : best.code;
  if (search.distances) search.distances[at] = best.distance;
  if (search.margins) search.margins[at] = best_margin(best);
}

// Values from here on may still belong to the answer.
template <bool margin>
__device__ __forceinline__ double limit_of(const Search& search, const RowBound& bound, const Best& best) {
  return threshold(bound, margin ? best.second : best.distance, search.tokens.dim);
}

// One warp per row: score the best group, then every stream's best group that the threshold still allows. A row in
// which a stream's second best value is allowed too goes on the list.
template <class T, bool margin>
__global__ void __launch_bounds__(kPackThreads, 3) finish_rows(Search search) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= search.num_rows) return;
  const RowBound bound = search.bounds[row];
  const bool stale = search.stale();
  if (stale && row == 0 && lane == 0 && search.faults) search.faults->stale = 1;
  Best best = no_best();
  if (bound.status == kNotFinite) {
    if (lane == 0) {
      search.ids[search.first + row] = -1;
      if (search.distances) search.distances[search.first + row] = NAN;
      if (search.margins) search.margins[search.first + row] = NAN;
    }
    return;
  }
  bool incomplete = true;
  if (bound.status == kCertified && !search.exact_only && !stale) {
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
    warp_score_group<T, margin>(search, row, records[top].group, best);
    double limit = limit_of<margin>(search, bound, best);
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
        warp_score_group<T, margin>(search, row, group, best);
        limit = limit_of<margin>(search, bound, best);
      }
    }
    bool again = margin && !(limit >= 0.0);
    for (int stream = lane; stream < search.streams; stream += 32) {
      again = again || reaches(records[stream].second, limit);
    }
    incomplete = __any_sync(kAllLanes, again);
  }
  if (lane == 0) {
    search.best[row] = best;
    write_answer(search, row, best);
    if (incomplete) search.list[1 + atomicAdd(search.list, 1)] = row;
  }
}

// Item `item` of the exact launch: a set of listed rows against one part in `splits` of every stream that one of the
// rows still allows. The block that comes last to a set merges what the others left.
template <class T, bool margin, int rows>
__device__ __forceinline__ void finish_set(const Search& search, int count, int splits, int item) {
  __shared__ uint8_t open[kMaxSegments * kLanes];
  __shared__ Best bests[kWarps][rows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / kParts;
  const int set = item / splits, split = item % splits, begin = set * rows;
  const bool every = search.exact_only || search.stale();
  int row[rows];
  Best best[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {  // a short last set repeats its last row
    row[r] = search.list[1 + min(begin + r, count - 1)];
    best[r] = search.best[row[r]];
  }
  for (int stream = threadIdx.x; stream < search.streams; stream += kPackThreads) {
    bool any = every;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const RowBound bound = search.bounds[row[r]];
      const double limit = limit_of<margin>(search, bound, best[r]);
      any = any || bound.status == kExact || (margin && !(limit >= 0.0)) ||
            reaches(search.records[static_cast<int64_t>(row[r]) * search.streams + stream].second, limit);
    }
    open[stream] = any;
  }
  __syncthreads();
  int turn = 0;
  for (int stream = 0; stream < search.streams; ++stream) {
    if (!open[stream]) continue;
    const int first_tile = stream / kLanes * search.segment_tiles;
    const int last_tile = min(first_tile + search.segment_tiles, search.tiles);
    const int stream_codes = (last_tile - first_tile) * (kTile / kLanes);
    for (int step = 0; step < stream_codes; step += kStep, ++turn) {
      if (turn % splits != split) continue;
      // The stream's codes: kGroup consecutive ones out of every kSpan.
      const int at = step + team * kEach;
      const int64_t code =
          static_cast<int64_t>(first_tile) * kTile + at / kGroup * kSpan + stream % kLanes * kGroup + at % kGroup;
      team_score<T, margin>(search, row, code, at < stream_codes, best);
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    warp_best<margin>(best[r], search.codes);
    if (lane == 0) bests[warp][r] = best[r];
  }
  __syncthreads();
  if (threadIdx.x < rows && begin + static_cast<int>(threadIdx.x) < count) {
    const int r = threadIdx.x;
    Best winner = bests[0][r];
    for (int other = 1; other < kWarps; ++other) best_merge<margin>(winner, search.codes, bests[other][r]);
    bool last = true;
    if (splits > 1) {
      Best* partial = search.partial + static_cast<int64_t>(set) * splits;
      partial[split] = winner;
      __threadfence();
      last = atomicAdd(&search.finished[set], 1) == splits - 1;
      __threadfence();
      for (int other = 0; last && other < splits; ++other) {
        const volatile Best& left = partial[other];
        const Best copy = {left.distance, left.code, left.second};
        best_merge<margin>(winner, search.codes, copy);
      }
    }
    if (last) write_answer(search, search.list[1 + begin + r], winner);
  }
  __syncthreads();
}

// The exact launch over the listed rows. The order of the list varies from run to run; the answers do not, being
// minima over (distance, index).
template <class T, bool margin>
__global__ void __launch_bounds__(kPackThreads, 2) finish_listed(Search search) {
  const int count = search.list[0];
  if (count <= kSplitRows) {
    const int most = search.exact_only ? kManySplits : kFewSplits;
    const int splits = min(most, kPartials / max(count, 1));
    for (int item = blockIdx.x; item < count * splits; item += gridDim.x) {
      finish_set<T, margin, 1>(search, count, splits, item);
    }
  } else {
    const int sets = (count + kSetRows - 1) / kSetRows;
    for (int set = blockIdx.x; set < sets; set += gridDim.x) finish_set<T, margin, kSetRows>(search, count, 1, set);
  }
}

}  // namespace tmm
