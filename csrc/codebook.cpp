#include "codebook.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "pool.h"

namespace tmm {
namespace {

constexpr int64_t kMeanSample = 1024;  // the mean only has to be near: centring changes no argmin

}  // namespace

bool Rows::finite(int64_t i) const {
  for (int64_t j = 0; j < d; ++j)
    if (!std::isfinite(dtype == TMM_F64 ? f64(i)[j] : f32(i)[j])) return false;
  return true;
}

bool Rows::equal(int64_t a, int64_t b) const {
  for (int64_t j = 0; j < d; ++j)
    if (dtype == TMM_F64 ? f64(a)[j] != f64(b)[j] : f32(a)[j] != f32(b)[j]) return false;
  return true;
}

void Codebook::find_mean(const Rows& codes, Summary* out) const {
  std::vector<double> sum(d, 0.0), row(d);
  const int64_t stride = (k + kMeanSample - 1) / kMeanSample;
  int64_t used = 0;
  for (int64_t i = 0; i < k; i += stride) {
    if (!codes.finite(i)) continue;
    codes.to_double(i, row.data());
    for (int64_t j = 0; j < d; ++j) sum[j] += row[j];
    ++used;
  }
  out->mean.assign(padded, 0.0f);
  out->zero.assign(padded, 0.0f);
  for (int64_t j = 0; j < d && used; ++j) {
    const float value = static_cast<float>(sum[j] / static_cast<double>(used));
    out->mean[j] = std::isfinite(value) ? value : 0.0f;
  }
}

// A code equal to an earlier one can never win the tie, and many of them would all survive every bound: take them out.
// Equal rows have equal norms bit for bit, so the norm serves as the hash.
void Codebook::drop_repetitions(const Rows& codes, const std::vector<double>& norm2, Summary* out) const {
  uint64_t size = 16;
  while (size < 2 * static_cast<uint64_t>(k)) size *= 2;
  std::vector<int32_t> table(size, -1);
  for (int64_t i = 0; i < k; ++i) {
    if (std::isinf(out->bias[i])) continue;
    uint64_t bits;
    std::memcpy(&bits, &norm2[i], sizeof bits);
    bits = (bits ^ (bits >> 29)) * 0x9E3779B97F4A7C15ull;
    uint64_t slot = (bits >> 20) & (size - 1);
    for (int steps = 0;; slot = (slot + 1) & (size - 1)) {
      const int32_t other = table[slot];
      if (other < 0) {
        table[slot] = static_cast<int32_t>(i);
        ++out->usable;
        break;
      }
      if (norm2[other] != norm2[i]) continue;
      if (codes.equal(other, i)) {
        out->bias[i] = -std::numeric_limits<float>::infinity();
        break;
      }
      if (++steps == 8) {  // different rows of one norm (signs, permutations): give up, repetitions cost time only
        ++out->usable;
        break;
      }
    }
  }
}

void Codebook::summarise(const Rows& codes, int threads, Summary* out) const {
  find_mean(codes, out);
  out->bias.assign(k, 0.0f);
  out->tops.assign(d, 0.0f);
  std::vector<double> norm2(k);
  std::mutex merge;
  for_chunks(k, 256, threads, [&](int64_t first, int64_t last) {
    Buffer<float> row(padded);
    std::vector<float> tops(d, 0.0f);
    bool fits = true, finite = true;
    for (int64_t i = first; i < last; ++i) {
      const RowStats stats = codes.centre(*isa, i, out->mean.data(), 1.0f, row.get());
      norm2[i] = stats.norm2;
      if (std::isfinite(stats.norm2) && std::isfinite(stats.largest)) {
        for (int64_t j = 0; j < d; ++j) tops[j] = std::max(tops[j], std::fabs(row[j]));
      } else {
        fits = false;
        finite = finite && codes.finite(i);
      }
    }
    std::lock_guard<std::mutex> lock(merge);
    for (int64_t j = 0; j < d; ++j) out->tops[j] = std::max(out->tops[j], tops[j]);
    out->representable = out->representable && fits;
    out->finite = out->finite && finite;
  });
  if (!out->finite) return;
  out->largest = *std::max_element(out->tops.begin(), out->tops.end());
  drop_repetitions(codes, norm2, out);
  if (out->usable == 1)
    for (out->only = 0; std::isinf(out->bias[out->only]);) ++out->only;
  out->representable = out->representable && out->largest > 0;
  if (!out->representable) return;
  out->scale = std::ldexp(1.0f, -std::clamp(std::ilogb(out->largest), -120, 120));
  out->largest *= out->scale;
  for (float& top : out->tops) top *= out->scale;
  for (int64_t i = 0; i < k; ++i) {
    if (std::isinf(out->bias[i])) continue;
    const double scaled = norm2[i] * out->scale * out->scale;
    out->radius = std::max(out->radius, scaled);
    out->bias[i] = static_cast<float>(-0.5 * scaled);
  }
  out->max_bias = 0.5 * out->radius;
  out->radius = std::sqrt(out->radius);
}

void Pack::reorder(const float* x, float* out) const {
  float* rest = narrow(out);
  std::fill(out + wide, rest, 0.0f);
  int64_t from = 0;
  for (int64_t i = 0; i < wide; ++i) {  // both kinds are in the order of the dimensions
    out[i] = x[order[i]];
    rest = std::copy(x + from, x + order[i], rest);
    from = order[i] + 1;
  }
  rest = std::copy(x + from, x + order.size(), rest);
  std::fill(rest, narrow(out) + narrow_padded(), 0.0f);
}

float Pack::mixed_scale(const Isa& isa, float* ordered) const {
  float top = 0;
  for (int64_t i = 0; i < wide; ++i) top = std::max(top, std::fabs(ordered[i]));
  const float* rest = narrow(ordered);
  float narrow_top = 0;
  for (int64_t i = 0; i < narrow_padded(); ++i) narrow_top = std::max(narrow_top, std::fabs(rest[i]));
  const float least = std::max(narrow_top / kTokenLevels, top / kWideLevels);
  return isa.run_scale ? std::max(least, isa.run_scale(rest, narrow_padded())) : least;
}

QuantStats Pack::quantise_mixed(const Isa& isa, float* ordered, float scale, int32_t* words) const {
  const QuantStats a = isa.quantise[kInt16](ordered, narrow(ordered) - ordered, scale, words);
  const QuantStats b = isa.quantise[kInt8](narrow(ordered), narrow_padded(), scale, words + wide / 2);
  return {a.residual2 + b.residual2, b.sum};  // only 8-bit codes are stored with an offset
}

// A few dimensions much larger than the others would set the step of 8-bit values for all of them, and with it the bound. Those
// are kept in 16 bits with the same step, at twice the cost each; up to one dimension in 16, and where it makes the step much finer.
void Codebook::choose_wide(const Rows& codes, const Summary& known, Pack* pack) const {
  const int64_t most = std::min(kMaxWide, d / 32 * 2), stride = (k + kMeanSample - 1) / kMeanSample;
  pack->scale = std::max(known.largest, 1e-30f) / isa->code_levels;
  if (most < 2) return;
  std::vector<float> top(d, 0.0f), row(padded);
  for (int64_t i = 0; i < k; i += stride) {
    if (std::isinf(known.bias[i])) continue;
    centre(known, codes, i, kInt8, row.data());
    for (int64_t j = 0; j < d; ++j) top[j] = std::max(top[j], std::fabs(row[j]));
  }
  std::vector<int32_t> order(d);
  for (int64_t j = 0; j < d; ++j) order[j] = static_cast<int32_t>(j);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return top[a] > top[b]; });
  if (top[order[most]] > 0.6f * top[order[0]]) return;
  int64_t wide = 2;
  while (wide < most && top[order[wide]] > 1.25f * top[order[most]]) wide += 2;
  pack->scale = 1e-30f;
  for (int64_t i = 0; i < d; ++i) pack->scale = std::max(pack->scale, known.tops[order[i]] / (i < wide ? kWideLevels : isa->code_levels));
  std::sort(order.begin(), order.begin() + wide);
  std::sort(order.begin() + wide, order.end());
  pack->order = std::move(order);
  pack->wide = wide;
}

void Codebook::fill(const Rows& codes, const Summary& known, int which, int threads, Pack* made) const {
  const int per_word = which == kInt8 ? 4 : which == kInt16 ? 2 : 1;
  const int64_t lanes = isa->lanes, vectors = isa->vectors, panel = lanes * vectors, pass = lanes * isa->tile;
  if (which == kInt8) choose_wide(codes, known, made);
  const int64_t wide = made->wide, wide_steps = wide / 2;
  const int64_t depth = which == kInt8 ? isa->depth : 1;
  const int64_t steps = made->steps = wide_steps + ((d - wide + per_word - 1) / per_word + depth - 1) / depth * depth;
  // Bytes with an offset, in 8 bits or 7, have no sign: that flips the highest of them.
  const int64_t narrow_from = which == kInt8 ? wide_steps : steps;
  const uint32_t levels = static_cast<uint32_t>(isa->code_levels), bits = 0x01010101u * (2 * levels + 1);
  const uint32_t flip = 0x01010101u * static_cast<uint32_t>(isa->code_offset);
  std::mutex merge;
  if (which == kInt16) made->scale = static_cast<float>(std::max(known.radius, 1e-30) / (kInt16Norm - std::sqrt(d)));
  made->codes.reset(panels * panel * steps + panel * kReadAhead);  // the rest is read, and counts for nothing
  made->bias.reset(panels * panel);
  for_chunks(panels, std::max<int64_t>(1, 512 / panel), threads, [&](int64_t first, int64_t last) {
    Buffer<float> row(padded);
    Buffer<float> ordered(made->words(padded));
    Buffer<int32_t> words(made->words(padded));
    double worst = 0;
    for (int64_t code = first * panel; code < last * panel; ++code) {
      const int64_t in_panel = code % panel, vector = in_panel % vectors, lane = in_panel / vectors;
      const bool wins = code < k && !std::isinf(known.bias[code]);
      if (wins) {
        centre(known, codes, code, which, row.get());
      } else {
        std::fill(row.get(), row.get() + padded, 0.0f);
      }
      const void* source = row.get();
      if (wide) {
        made->reorder(row.get(), ordered.get());
        worst = std::max<double>(worst, made->quantise_mixed(*isa, ordered.get(), made->scale, words.get()).residual2);
        source = words.get();
      } else if (which < kFloat32) {
        worst = std::max<double>(worst, isa->quantise[which](row.get(), padded, made->scale, words.get()).residual2);
        source = words.get();
      }
      const char* from = static_cast<const char*>(source);
      const int64_t place = vector % isa->tile * lanes + lane, next = depth * pass - depth + 1;
      int32_t* out = &made->codes[code / panel * panel * steps + vector / isa->tile * pass * steps + place];
      for (int64_t step = 0; step < narrow_from; ++step, out += pass, from += 4) std::memcpy(out, from, 4);
      out += (depth - 1) * place;
      for (int64_t step = narrow_from; step < steps; ++step, from += 4) {
        uint32_t word;
        std::memcpy(&word, from, 4);
        *out = static_cast<int32_t>((word & bits) ^ flip);
        out += (step - narrow_from + 1) & (depth - 1) ? 1 : next;
      }
      const float start = which == kDifference ? 0.0f : known.bias[code < k ? code : 0];
      made->bias[code / panel * panel + vector * lanes + lane] = wins ? start : -std::numeric_limits<float>::infinity();
    }
    std::lock_guard<std::mutex> lock(merge);
    made->residual = std::max(made->residual, worst);
  });
  made->residual = std::sqrt(made->residual) * 1.001;
}

const Tree& Codebook::box_tree(const Rows& codes, int threads) {
  const Summary& known = summary(codes, threads);
  return tree_.get([&](Tree* made) { build_tree(*this, known, codes, made); });
}

int64_t Codebook::bytes() const {
  int64_t total = 0;
  if (const Summary* known = summary_.peek())
    total += static_cast<int64_t>((known->mean.capacity() + known->bias.capacity() + known->tops.capacity()) * sizeof(float));
  for (const auto& part : packs_)
    if (const Pack* pack = part.peek()) total += pack->codes.bytes() + pack->bias.bytes();
  if (const Tree* tree = tree_.peek()) {
    for (const auto* part : {&tree->super_bounds, &tree->leaf_bounds, &tree->leaf_codes}) total += part->bytes();
    for (const auto* part : {&tree->grid_super_bounds, &tree->grid_leaf_bounds, &tree->grid_leaf_codes, &tree->index})
      total += part->bytes();
  }
  return total;
}

}  // namespace tmm
