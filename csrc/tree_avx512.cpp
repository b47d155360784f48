// The box tree on AVX-512 with VNNI, in 16-bit fixed point: 32 differences an instruction, and their squares summed by another.
//
// z and the codes are rounded to the grid q(v) = round((v - origin) * unit), the same for both. Boxes hold the smallest and the
// largest q of their codes, so the integer distance to a box is at most that to any code in it: no rounding is left between
// boxes and codes. A coordinate of q is off by at most 0.51, hence a distance on the grid is off by at most e = 1.02 sqrt(dim).
// If any code has the squared grid distance m, the nearest code c is truly no farther than that one:
//
//   |q(z) - q(c)| <= unit |z - c| + e <= sqrt(m) + 2 e =: sqrt(reach),
//
// so the codes within `reach` of the final m are all that can win; they are scored in double precision elsewhere. Sums saturate
// at the largest int32, which only makes a box or a code look nearer; a reach that large is refused.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

namespace tmm {
namespace {

constexpr int32_t kFar = 0x7fffffff;

inline __attribute__((always_inline)) void add_squares(__m512i& sum, __m512i gap) {
  asm("vpdpwssds %1, %1, %0" : "+v"(sum) : "v"(gap));  // inline: gcc 12 copies the accumulator around the intrinsic
}

// Squared distances to 16 boxes.
template <int kPairs>
inline __attribute__((always_inline)) __m512i box_bound(const int32_t* bounds, const __m512i* z) {
  __m512i sum = _mm512_setzero_si512();
  for (int p = 0; p < kPairs; ++p) {
    const __m512i below = _mm512_subs_epu16(_mm512_load_si512(bounds + p * kLeaf), z[p]);
    const __m512i above = _mm512_subs_epu16(z[p], _mm512_load_si512(bounds + (kPairs + p) * kLeaf));
    add_squares(sum, _mm512_or_si512(below, above));  // one of the two is zero
  }
  return sum;
}

template <int kPairs>
inline __attribute__((always_inline)) __m512i leaf_distances(const int32_t* codes, const __m512i* z) {
  __m512i sum = _mm512_setzero_si512();
  for (int p = 0; p < kPairs; ++p) add_squares(sum, _mm512_sub_epi16(z[p], _mm512_load_si512(codes + p * kLeaf)));
  return sum;
}

inline int lowest_lane(__m512i v) {
  const __m512i least = _mm512_set1_epi32(_mm512_reduce_min_epi32(v));
  return __builtin_ctz(_mm512_cmpeq_epi32_mask(v, least));
}

// Writes base + lane for the lanes of `mask`, and up to 16 values past them.
inline int64_t append(int32_t* list, int64_t count, __m512i base, __mmask16 mask) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(base, lanes)));
  return count + __builtin_popcount(mask);
}

inline int32_t reach_of(int32_t m, float slack) {
  const float root = __builtin_sqrtf(static_cast<float>(m)) * (1.0f + 0x1p-20f) + slack;
  const float reach = root * root * (1.0f + 0x1p-20f) + 1.0f;
  return reach < 2e9f ? static_cast<int32_t>(reach) : kFar;
}

template <int kPairs>
inline void broadcast(const int32_t* words, __m512i* z) {
  for (int p = 0; p < kPairs; ++p) z[p] = _mm512_set1_epi32(words[p]);
}

// Token to grid; false: not inside it.
template <int kPairs>
bool to_grid(const GridTree& tree, const float* point, int dim, int32_t* words) {
  const __mmask16 mask = static_cast<__mmask16>((1u << dim) - 1);
  const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, point), _mm512_loadu_ps(tree.origin));
  const __m512 value = _mm512_mul_ps(gap, _mm512_set1_ps(tree.unit));
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(mask, _mm512_abs_ps(value), _mm512_set1_ps(kGridReach), _CMP_LE_OQ);
  const __m512i q = _mm512_maskz_add_epi32(mask, _mm512_cvtps_epi32(value), _mm512_set1_epi32(kGridCentre));
  alignas(64) int32_t packed[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi32_epi16(q));
  for (int p = 0; p < kPairs; ++p) words[p] = packed[p];
  return inside == mask;
}

// Every stage runs over all tokens before the next, so that the long chains inside a stage overlap between tokens.
template <int kPairs>
struct GridSearch {
  static constexpr int64_t kBox = 2 * kPairs * kLeaf, kCodes = kPairs * kLeaf;
  const GridTree& tree;
  int64_t blocks;
  int32_t* bounds;     // [kTreeBatch][blocks * kLeaf] distances to super boxes
  int32_t* supers;     // [blocks * kLeaf + kLeaf]
  int32_t* leaves;     // [kTreeLeaves + 2 * kLeaf]
  int32_t* distances;  // [kTreeLeaves + 2 * kLeaf][kLeaf]
  int32_t words[kTreeBatch][kPairs];
  int32_t reach[kTreeBatch];

  // The distance to the best code of the nearest leaf of the nearest super box.
  void first_reach(int64_t row) {
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    int32_t* out = bounds + row * blocks * kLeaf;
    __m512i nearest = _mm512_set1_epi32(kFar), where = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
      const __m512i bound = box_bound<kPairs>(tree.super_bounds + b * kBox, z);
      _mm512_store_si512(out + b * kLeaf, bound);
      const __mmask16 less = _mm512_cmplt_epi32_mask(bound, nearest);
      nearest = _mm512_mask_mov_epi32(nearest, less, bound);
      where = _mm512_mask_mov_epi32(where, less, _mm512_set1_epi32(static_cast<int>(b)));
    }
    alignas(64) int32_t position[kLeaf];
    _mm512_store_si512(position, where);
    const int lane = lowest_lane(nearest);
    int64_t home = int64_t{position[lane]} * kLeaf + lane;
    home = home < tree.supers ? home : tree.supers - 1;
    const int start = lowest_lane(box_bound<kPairs>(tree.leaf_bounds + home * kBox, z));
    const __m512i d2 = leaf_distances<kPairs>(tree.leaf_codes + (home * kLeaf + start) * kCodes, z);
    reach[row] = reach_of(_mm512_reduce_min_epi32(d2), tree.slack);
  }

  // Leaves within reach; -1: too many.
  int64_t list_leaves(int64_t row, const __m512i* z) {
    const __m512i limit = _mm512_set1_epi32(reach[row]), last = _mm512_set1_epi32(static_cast<int>(tree.supers - 1));
    const int32_t* bound = bounds + row * blocks * kLeaf;
    int64_t near_supers = 0, near_leaves = 0;
    for (int64_t b = 0; b < blocks; ++b)
      near_supers = append(supers, near_supers, _mm512_set1_epi32(static_cast<int>(b * kLeaf)),
                           _mm512_cmple_epi32_mask(_mm512_load_si512(bound + b * kLeaf), limit));
    for (int64_t i = 0; i < near_supers; i += kLeaf)  // boxes past the end repeat the last one
      _mm512_storeu_si512(supers + i, _mm512_min_epi32(_mm512_loadu_si512(supers + i), last));
    for (int64_t i = 0; i < near_supers; ++i) {
      const int64_t box = supers[i];
      const __m512i near = box_bound<kPairs>(tree.leaf_bounds + box * kBox, z);
      near_leaves = append(leaves, near_leaves, _mm512_set1_epi32(static_cast<int>(box * kLeaf)),
                           _mm512_cmple_epi32_mask(near, limit));
      if (near_leaves > kTreeLeaves) return -1;
    }
    return near_leaves;
  }

  int32_t search(int64_t row, int32_t* slots) {
    if (reach[row] == kFar) return -1;
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    const int64_t count = list_leaves(row, z);
    if (count < 0) return -1;
    __m512i nearest = _mm512_set1_epi32(kFar);
    for (int64_t i = 0; i < count; ++i) {
      const __m512i d2 = leaf_distances<kPairs>(tree.leaf_codes + leaves[i] * kCodes, z);
      _mm512_store_si512(distances + i * kLeaf, d2);
      nearest = _mm512_min_epi32(nearest, d2);
    }
    const __m512i limit = _mm512_set1_epi32(reach_of(_mm512_reduce_min_epi32(nearest), tree.slack));
    for (int64_t i = count; i % 2; ++i) _mm512_store_si512(distances + i * kLeaf, _mm512_set1_epi32(kFar));
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += 2) {
      const __m512i a = _mm512_load_si512(distances + i * kLeaf), b = _mm512_load_si512(distances + (i + 1) * kLeaf);
      uint32_t mask = _mm512_cmple_epi32_mask(a, limit) | static_cast<uint32_t>(_mm512_cmple_epi32_mask(b, limit)) << 16;
      for (; mask; mask &= mask - 1) {
        if (found == kTreeCandidates) return -1;
        const int bit = __builtin_ctz(mask);
        slots[found++] = leaves[i + bit / kLeaf] * kLeaf + bit % kLeaf;
      }
    }
    return static_cast<int32_t>(found);
  }
};

template <int kPairs>
void grid_search(const GridTree& tree, int dim, const float* z, int64_t rows, int32_t* scratch, int32_t* slots, int32_t* found) {
  const int64_t blocks = (tree.supers + kLeaf - 1) / kLeaf;
  int32_t* supers = scratch + kTreeBatch * blocks * kLeaf;
  int32_t* leaves = supers + (blocks + 1) * kLeaf;
  GridSearch<kPairs> search{tree, blocks, scratch, supers, leaves, leaves + kTreeLeaves + 2 * kLeaf, {}, {}};
  bool inside[kTreeBatch];
  for (int64_t row = 0; row < rows; ++row) inside[row] = to_grid<kPairs>(tree, z + row * dim, dim, search.words[row]);
  for (int64_t row = 0; row < rows; ++row) search.first_reach(row);
  for (int64_t row = 0; row < rows; ++row) found[row] = inside[row] ? search.search(row, slots + row * kTreeCandidates) : -1;
}

}  // namespace

void grid_candidates_avx512(const GridTree& tree, int dim, const float* z, int64_t rows, int32_t* scratch, int32_t* slots,
                            int32_t* found) {
  switch ((dim + 1) / 2) {
#define TMM_GRID(pairs) case pairs: return grid_search<pairs>(tree, dim, z, rows, scratch, slots, found);
    TMM_GRID(1) TMM_GRID(2) TMM_GRID(3) TMM_GRID(4) TMM_GRID(5) TMM_GRID(6)
#undef TMM_GRID
  }
}

}  // namespace tmm

#endif
