// The bits of a mask of 16 lanes, for files compiled with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tmm {
namespace {

// By way of a register of 16 bits: gcc 12 may store 16 bits of a mask and read 64 of them back, where it lacks registers (seen
// under ThreadSanitizer).
inline __attribute__((always_inline)) uint32_t bits_of(__mmask16 mask) {
  uint16_t bits = mask;
  asm("" : "+r"(bits));
  return bits;
}

}  // namespace
}  // namespace tmm
