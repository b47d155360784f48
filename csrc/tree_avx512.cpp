// The vectors of tree_search.h on AVX-512 with VNNI: one register.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "mask_512.h"
#include "tree_search.h"

namespace tmm {
namespace {

struct Avx512 {
  using Ints = __m512i;
  using Floats = __m512;
  using Mask = __mmask16;

  static inline Ints fill(int32_t x) { return _mm512_set1_epi32(x); }
  static inline Floats fill(float x) { return _mm512_set1_ps(x); }
  static inline Floats floats(float x) { return _mm512_set1_ps(x); }
  static inline Ints lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static inline Ints load(const int32_t* p) { return _mm512_load_si512(p); }
  static inline Floats load(const float* p) { return _mm512_load_ps(p); }
  static inline Ints load_any(const int32_t* p) { return _mm512_loadu_si512(p); }
  static inline Floats load_any(const float* p) { return _mm512_loadu_ps(p); }
  static inline Floats load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<Mask>((1u << n) - 1), p); }
  static inline void store(int32_t* p, Ints v) { _mm512_store_si512(p, v); }
  static inline void store_any(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
  static inline void store(float* p, Floats v) { _mm512_store_ps(p, v); }

  static inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }
  static inline Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
  static inline Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
  static inline float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

  static inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
  static inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
  static inline Ints merge(Ints a, Ints b, Ints bits) { return _mm512_ternarylogic_epi32(bits, a, b, 0xac); }  // b where bits are set
  static inline Ints sub_pairs(Ints a, Ints b) { return _mm512_sub_epi16(a, b); }
  static inline Ints sub_or_zero(Ints a, Ints b) { return _mm512_subs_epu16(a, b); }
  static inline __attribute__((always_inline)) void add_squares(Ints& sum, Ints gap) {
    asm("vpdpwssd %1, %1, %0" : "+v"(sum) : "v"(gap));  // inline: gcc 12 copies the accumulator around the intrinsic
  }

  static inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
  static inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static inline Mask at_most(Ints a, Ints b) { return _mm512_cmple_epi32_mask(a, b); }
  static inline Mask at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static inline Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static inline uint32_t bits(Mask m) { return bits_of(m); }
  static inline Ints choose(Mask m, Ints without, Ints with) { return _mm512_mask_mov_epi32(without, m, with); }
  static inline Floats choose(Mask m, Floats without, Floats with) { return _mm512_mask_mov_ps(without, m, with); }
  static inline int32_t least(Ints v) { return _mm512_reduce_min_epi32(v); }
  static inline float least(Floats v) { return _mm512_reduce_min_ps(v); }
  // Writes the lanes of `mask` in order, and up to 16 values past them; returns how many there are.
  static inline int64_t compress(int32_t* list, Ints v, Mask mask) {
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(mask, v));
    return __builtin_popcount(bits(mask));
  }
};

}  // namespace

const TreeLoops kTreeAvx512 = {tree_candidates<Avx512>, grid_candidates<Avx512>};

}  // namespace tmm

#endif
