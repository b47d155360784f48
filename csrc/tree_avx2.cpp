// The vectors of tree_search.h on AVX2: two registers.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include "tree_search.h"

namespace tmm {
namespace {

// Lane numbers that move the lanes of a mask of 8 to the front, a byte each.
struct Fronts {
  alignas(64) uint64_t of[256];
  constexpr Fronts() : of() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, count = 0; lane < 8; ++lane)
        if (mask >> lane & 1) of[mask] |= static_cast<uint64_t>(lane) << 8 * count++;
  }
};
constexpr Fronts kFronts;

struct Ints16 {
  __m256i low, high;
};
struct Floats16 {
  __m256 low, high;
};

struct Avx2 {
  using Ints = Ints16;
  using Floats = Floats16;
  using Mask = Ints16;  // all bits of a lane, or none

#define TMM_INLINE static inline __attribute__((always_inline))
#define TMM_BOTH(type, call) type{call(a.low, b.low), call(a.high, b.high)}

  TMM_INLINE Ints fill(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  TMM_INLINE Floats fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  TMM_INLINE Floats floats(float x) { return fill(x); }
  TMM_INLINE Ints lanes() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }
  TMM_INLINE Ints load_any(const int32_t* p) { return {integers(p), integers(p + 8)}; }
  TMM_INLINE Floats load_any(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  TMM_INLINE Ints load(const int32_t* p) { return load_any(p); }
  TMM_INLINE Floats load(const float* p) { return load_any(p); }
  TMM_INLINE Floats load_first(const float* p, int n) {
    const Mask mask = less(lanes(), fill(n));
    return {_mm256_maskload_ps(p, mask.low), _mm256_maskload_ps(p + (n > 8 ? 8 : 0), mask.high)};
  }
  TMM_INLINE void store(int32_t* p, Ints v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), v.low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 8), v.high);
  }
  TMM_INLINE void store_any(int32_t* p, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.high);
  }
  TMM_INLINE void store(float* p, Floats v) {
    _mm256_store_ps(p, v.low);
    _mm256_store_ps(p + 8, v.high);
  }

  TMM_INLINE Floats sub(Floats a, Floats b) { return TMM_BOTH(Floats, _mm256_sub_ps); }
  TMM_INLINE Floats multiply(Floats a, Floats b) { return TMM_BOTH(Floats, _mm256_mul_ps); }
  TMM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  TMM_INLINE Floats max(Floats a, Floats b) { return TMM_BOTH(Floats, _mm256_max_ps); }
  TMM_INLINE Floats absolute(Floats b) {
    const Floats a = floats(-0.0f);
    return TMM_BOTH(Floats, _mm256_andnot_ps);
  }
  TMM_INLINE Ints rounded(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  TMM_INLINE Ints as_ints(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
  TMM_INLINE float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

  TMM_INLINE Ints add(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_add_epi32); }
  TMM_INLINE Ints min(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_min_epi32); }
  TMM_INLINE Ints either(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_or_si256); }
  TMM_INLINE Ints merge(Ints other, Ints a, Ints b) {  // a where the bits b are set
    const Ints kept = {_mm256_andnot_si256(b.low, other.low), _mm256_andnot_si256(b.high, other.high)};
    return either(kept, TMM_BOTH(Ints, _mm256_and_si256));
  }
  TMM_INLINE Ints sub_pairs(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_sub_epi16); }
  TMM_INLINE Ints sub_or_zero(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_subs_epu16); }
  TMM_INLINE void add_squares(Ints& sum, Ints gap) {
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(gap.low, gap.low));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(gap.high, gap.high));
  }

  TMM_INLINE Mask less(Ints b, Ints a) { return TMM_BOTH(Ints, _mm256_cmpgt_epi32); }
  TMM_INLINE Mask less(Floats a, Floats b) {
    return as_ints({_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)});
  }
  TMM_INLINE Mask at_most(Ints a, Ints b) { return equal(min(a, b), a); }
  TMM_INLINE Mask at_most(Floats a, Floats b) {
    return as_ints({_mm256_cmp_ps(a.low, b.low, _CMP_LE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LE_OQ)});
  }
  TMM_INLINE Mask equal(Ints a, Ints b) { return TMM_BOTH(Ints, _mm256_cmpeq_epi32); }
  TMM_INLINE uint32_t bits(Mask m) { return eight(m.low) | eight(m.high) << 8; }
  TMM_INLINE Ints choose(Mask m, Ints without, Ints with) {
    return {_mm256_blendv_epi8(without.low, with.low, m.low), _mm256_blendv_epi8(without.high, with.high, m.high)};
  }
  TMM_INLINE Floats choose(Mask m, Floats without, Floats with) {
    return {_mm256_blendv_ps(without.low, with.low, _mm256_castsi256_ps(m.low)),
            _mm256_blendv_ps(without.high, with.high, _mm256_castsi256_ps(m.high))};
  }
  TMM_INLINE int32_t least(Ints v) {
    const __m256i eight = _mm256_min_epi32(v.low, v.high);
    __m128i four = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  TMM_INLINE float least(Floats v) {
    const __m256 eight = _mm256_min_ps(v.low, v.high);
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
  }
  // Writes the lanes of `mask` in order, and up to 16 values past them; returns how many there are.
  TMM_INLINE int64_t compress(int32_t* list, Ints v, Mask mask) {
    const uint32_t low = eight(mask.low), high = eight(mask.high);
    const int count = __builtin_popcount(low);
    front(list, v.low, low);
    front(list + count, v.high, high);
    return count + __builtin_popcount(high);
  }

 private:
  TMM_INLINE __m256i integers(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  TMM_INLINE uint32_t eight(__m256i mask) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask))); }
  TMM_INLINE void front(int32_t* list, __m256i v, uint32_t mask) {
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kFronts.of[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list), _mm256_permutevar8x32_epi32(v, order));
  }
};

}  // namespace

const TreeLoops kTreeAvx2 = {tree_candidates<Avx2>, grid_candidates<Avx2>};

}  // namespace tmm

#endif
