// Parts of the scan of isa.h on 512-bit registers, for files compiled with AVX-512: a panel is 64 codes (4 vectors of 16 lanes), and
// 6 tokens x 4 vectors of accumulators stay in registers.
#pragma once

#include <immintrin.h>

#include "isa.h"

namespace tmm {
namespace {

constexpr int kLanes = 16, kVectors = 4, kPanel = kLanes * kVectors;

// Inline assembly, because gcc 12 spills every accumulator around the intrinsics.
inline __attribute__((always_inline)) void multiply_add(__m512i& sum, __m512i codes, __m512i token, const uint8_t*) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(token));  // codes unsigned, tokens signed
}
inline __attribute__((always_inline)) void multiply_add(__m512i& sum, __m512i codes, __m512i token, const int16_t*) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(token));
}
inline __attribute__((always_inline)) void multiply_add(__m512i& sum, __m512i codes, __m512i token, const float*) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(token));
}

struct Gap {};  // tag of the difference rung: minus the sum of squared differences
inline __attribute__((always_inline)) void multiply_add(__m512i& sum, __m512i codes, __m512i token, const Gap*) {
  __m512i gap;
  asm("vsubps %2, %1, %0" : "=v"(gap) : "v"(codes), "v"(token));
  asm("vfnmadd231ps %1, %1, %0" : "+v"(sum) : "v"(gap));
}

inline __m512i ordered(__m512i maximum, const float*) {  // float32 bits to an integer of the same order
  return _mm512_xor_si512(maximum, _mm512_and_si512(_mm512_srai_epi32(maximum, 31), _mm512_set1_epi32(0x7fffffff)));
}
inline __m512i ordered(__m512i maximum, const Gap*) { return ordered(maximum, static_cast<const float*>(nullptr)); }
template <class T>
inline __m512i ordered(__m512i maximum, const T*) { return maximum; }

inline __m512i maximum(__m512i a, __m512i b, const float*) {
  return _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}
inline __m512i maximum(__m512i a, __m512i b, const Gap*) { return maximum(a, b, static_cast<const float*>(nullptr)); }
template <class T>
inline __m512i maximum(__m512i a, __m512i b, const T*) { return _mm512_max_epi32(a, b); }

template <class T>
constexpr bool is_float(const T*) { return false; }
constexpr bool is_float(const float*) { return true; }
constexpr bool is_float(const Gap*) { return true; }

template <class T>
inline __attribute__((always_inline)) void add_step(__m512i (&sum)[kTileRows][kVectors], const __m512i* code, const int32_t* token,
                                                    const T* tag) {
  const __m512i c0 = _mm512_load_si512(code), c1 = _mm512_load_si512(code + 1);
  const __m512i c2 = _mm512_load_si512(code + 2), c3 = _mm512_load_si512(code + 3);
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    const __m512i t = _mm512_set1_epi32(token[r]);
    multiply_add(sum[r][0], c0, t, tag);
    multiply_add(sum[r][1], c1, t, tag);
    multiply_add(sum[r][2], c2, t, tag);
    multiply_add(sum[r][3], c3, t, tag);
  }
}

// The biases of a panel: in the integer units of every scale of the tokens, or as they are.
template <class T>
inline const int32_t* panel_biases(const ScanArgs& args, int64_t panel, const T* tag) {
  const float* bias = args.bias + panel * kPanel;
  if (is_float(tag)) return reinterpret_cast<const int32_t*>(bias);
  for (int s = 0; s < args.num_scales; ++s)
    for (int v = 0; v < kVectors; ++v) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(bias + v * kLanes), _mm512_set1_ps(args.inverse_scale[s]));
      const __m512 floor = _mm512_max_ps(scaled, _mm512_set1_ps(kInvalidBias));
      _mm512_storeu_si512(args.bias_table + s * kPanel + v * kLanes, _mm512_cvtps_epi32(floor));
    }
  return args.bias_table;
}

// Group maxima of a tile of tokens; `first`: of the first panel of a span.
template <class T>
inline __attribute__((always_inline)) void store_tops(const __m512i (&sum)[kTileRows][kVectors], int32_t* out, int64_t stride, bool first,
                                                      const T* tag) {
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r, out += stride) {
    __m512i top = ordered(maximum(maximum(sum[r][0], sum[r][1], tag), maximum(sum[r][2], sum[r][3], tag), tag), tag);
    if (!first) top = _mm512_max_epi32(top, _mm512_loadu_si512(out));
    _mm512_storeu_si512(out, top);
  }
}

}  // namespace
}  // namespace tmm
