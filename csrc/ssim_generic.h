// A strip of the maps of SSIM, in the vector types of rows_generic.h, which includes this file. Only additions, products and
// quotients of single columns in a fixed order: every instruction set gives the same bits.

typedef double Doubles __attribute__((vector_size(4 * TMM_LANES)));  // kWords lanes

constexpr int kSsimSums = 8;  // vectors summed at a time, so that additions overlap: four maps of two vectors of columns

// Sums over k values with a symmetric line of weights: values with one weight are added first. at(i, s): value i of sum s.
template <bool kEqual, class At>
inline __attribute__((always_inline)) void weigh(const double* line, int64_t k, At at, Doubles* sums) {
#pragma GCC unroll 8
  for (int s = 0; s < kSsimSums; ++s) sums[s] = Doubles{};
  for (int64_t i = 0; i < k / 2; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < kSsimSums; ++s) {
      const Doubles pair = at(i, s) + at(k - 1 - i, s);
      sums[s] += kEqual ? pair : pair * line[i];
    }
  }
  if (k % 2 == 0) return;
#pragma GCC unroll 8
  for (int s = 0; s < kSsimSums; ++s) sums[s] += kEqual ? at(k / 2, s) : at(k / 2, s) * line[k / 2];
}

// See SsimStrip in rows.h. Both factors are 1 - (difference of moments) / (sum of moments), by the moments of x - y and x + y.
template <class T, bool kEqual>
void ssim_rows(const SsimStrip& strip, double* lost) {
  constexpr int64_t kStep = 2 * kWords, kLine = kSsimColumns + kSsimTaps, kRow = 4 * kSsimColumns;
  const int64_t k = strip.k, padded = (strip.columns + kStep - 1) / kStep * kStep;
  const double mass = kEqual ? static_cast<double>(k * k) : 1.0, c1 = strip.c1 * mass * mass, c2 = strip.c2 * mass * mass;
  const double twice = 2 * strip.offset;
  double* maps = strip.memory;          // [4][kLine]: x - y, x + y and their squares, of one row
  double* ring = maps + 4 * kLine;      // [k][4][kSsimColumns]: sums along the last k rows
  double whole[kSsimColumns] = {}, contrast[kSsimColumns] = {};
  const double* taps[kSsimTaps];
  for (int64_t row = 0; row < strip.rows + k - 1; ++row) {
    const T* x = static_cast<const T*>(strip.x) + row * strip.stride;
    const T* y = static_cast<const T*>(strip.y) + row * strip.stride;
    double *__restrict__ gaps = maps, *__restrict__ totals = gaps + kLine;
    double *__restrict__ gap_squares = totals + kLine, *__restrict__ total_squares = gap_squares + kLine;
    for (int64_t i = 0; i < strip.columns + k - 1; ++i) {
      const double a = static_cast<double>(x[i]), b = static_cast<double>(y[i]), gap = a - b, total = a + b + twice;
      gaps[i] = gap, totals[i] = total, gap_squares[i] = gap * gap, total_squares[i] = total * total;
    }
    double* to = ring + row % k * kRow;
    Doubles sums[kSsimSums];
    for (int64_t j = 0; j < padded; j += kStep) {
      const auto at = [&](int64_t i, int s) __attribute__((always_inline)) {
        return load<Doubles>(maps + s / 2 * kLine + j + s % 2 * kWords + i);
      };
      weigh<kEqual>(strip.line, k, at, sums);
#pragma GCC unroll 8
      for (int s = 0; s < kSsimSums; ++s) __builtin_memcpy(to + s / 2 * kSsimColumns + j + s % 2 * kWords, &sums[s], sizeof(Doubles));
    }
    if (row < k - 1) continue;
    for (int64_t i = 0; i < k; ++i) taps[i] = ring + (row + 1 + i) % k * kRow;
    for (int64_t j = 0; j < padded; j += kStep) {
      const auto at = [&](int64_t i, int s) __attribute__((always_inline)) {
        return load<Doubles>(taps[i] + s / 2 * kSsimColumns + j + s % 2 * kWords);
      };
      weigh<kEqual>(strip.line, k, at, sums);
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const Doubles gap = sums[c] * sums[c], total = sums[2 + c] * sums[2 + c];
        const Doubles varying = sums[4 + c] * mass - gap, both = (sums[6 + c] * mass - total + varying) * 0.5 + c2;
        const Doubles level = (total + gap) * 0.5 + c1, inverse = 1.0 / (both * level);
        const Doubles light_lost = gap * both * inverse, contrast_lost = varying * level * inverse;
        const Doubles lost_whole = load<Doubles>(whole + j + c * kWords) + (light_lost + contrast_lost - light_lost * contrast_lost);
        const Doubles lost_contrast = load<Doubles>(contrast + j + c * kWords) + contrast_lost;
        __builtin_memcpy(whole + j + c * kWords, &lost_whole, sizeof(Doubles));
        __builtin_memcpy(contrast + j + c * kWords, &lost_contrast, sizeof(Doubles));
      }
    }
  }
  lost[0] = lost[1] = 0;
  for (int64_t j = 0; j < strip.columns; ++j) lost[0] += whole[j], lost[1] += contrast[j];
}

void ssim(const SsimStrip& strip, double* lost) {
  if (strip.wide)
    strip.equal ? ssim_rows<double, true>(strip, lost) : ssim_rows<double, false>(strip, lost);
  else
    strip.equal ? ssim_rows<float, true>(strip, lost) : ssim_rows<float, false>(strip, lost);
}
