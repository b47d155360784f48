// AVX-VNNI: AVX2 with products of bytes and of 16-bit integers that add into 32 bits. All but the integer rungs is that of AVX2.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)

#include "scan_256.h"

namespace tmm {
namespace {

inline __attribute__((always_inline)) void add_bytes(__m256i& sum, __m256i codes, __m256i token) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(token));  // codes unsigned, tokens signed
}
inline __attribute__((always_inline)) void add_words(__m256i& sum, __m256i codes, __m256i token) {
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(token));
}

struct EightBits : IntegerTop {
  static constexpr int kRows = 6;
  static inline __attribute__((always_inline)) void add(__m256i (&sum)[kRows][kTile], Place& at) {
    add_steps<kRows>(sum, at, at.wide, add_words);
    add_steps<kRows>(sum, at, at.narrow, add_bytes);
  }
};

float token_scale(const float* x, int64_t padded) {
  __m256 largest = _mm256_setzero_ps();
  for (int64_t i = 0; i < padded; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + i)));
  float lanes[kLanes], top = 0;
  _mm256_storeu_ps(lanes, largest);
  for (float lane : lanes) top = lane > top ? lane : top;
  return top / 127.0f;
}

}  // namespace

const Isa* avx_vnni_isa() {
  static const Isa isa = [] {
    Isa table = *avx2_isa();
    table.name = "avx_vnni";
    table.scan[kInt8] = scan<EightBits>;
    table.scan[kInt16] = scan<Plain<IntegerTop, add_words>>;
    table.code_levels = 127.0f;
    table.token_scale = token_scale;
    table.choice.cycles[kInt8] = 0.0144f;
    table.choice.cycles[kInt16] = 0.024f;
    return table;
  }();
  return &isa;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* avx_vnni_isa() { return nullptr; }
}  // namespace tmm

#endif
