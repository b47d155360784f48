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

}  // namespace

const Isa* avx_vnni_isa() {
  static const Isa isa = [] {
    Isa table = *avx2_isa();
    table.name = "avx_vnni";
    table.scan[kInt8] = scan<EightBits>;
    table.scan[kInt16] = scan<Plain<IntegerTop, add_words>>;
    table.code_levels = 127.0f;
    table.code_offset = 128;
    table.run_scale = nullptr;
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
