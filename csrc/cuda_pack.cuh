// Packing: the shift, the scales, the fp16 matrices with their extra columns, and the bound of every row
// (cuda_shared.h).
#pragma once

#include "cuda_machine.cuh"
#include "cuda_shared.h"

namespace tmm {

constexpr int kPackThreads = 256;
constexpr int kWarps = kPackThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A row is packed by a team: a warp, or a quarter of one where rows are narrow.
constexpr int kNarrowTeam = 8, kNarrow = 128;

// Over the lanes of a team: the same bits in every lane, in a fixed order.
template <int lanes>
__device__ __forceinline__ double team_sum(double value) {
  for (int step = lanes / 2; step > 0; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <int lanes>
__device__ __forceinline__ bool team_all(bool value) {
  int all = value;
  for (int step = lanes / 2; step > 0; step >>= 1) all &= __shfl_xor_sync(kAllLanes, all, step);
  return all != 0;
}

// sums[slab, col] over the finite values of the slab's codes; 32 columns x 8 rows of threads.
template <class T>
__global__ void __launch_bounds__(kPackThreads) slab_sums(Points codes, int64_t num_codes, int slabs, double* sums) {
  __shared__ double partial[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = blockIdx.x * 32 + lane;
  const int64_t begin = num_codes * blockIdx.y / slabs, end = num_codes * (blockIdx.y + 1) / slabs;
  double sum = 0.0;
  if (col < codes.dim) {
    TMM_UNROLL
    for (int64_t code = begin + warp; code < end; code += kWarps) {
      const double value = codes.value<T>(code, col);
      if (isfinite(value)) sum += value;
    }
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < codes.dim) {
    for (int other = 1; other < kWarps; ++other) sum += partial[other][lane];
    sums[static_cast<int64_t>(blockIdx.y) * codes.dim + col] = sum;
  }
}

// The shift. Any value is right; the mean of the finite values makes the bound tight.
__global__ void __launch_bounds__(kPackThreads) mean_of_slabs(const double* sums, int slabs, int dim, int64_t num_codes,
                                                              double* mean) {
  __shared__ double partial[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = blockIdx.x * 32 + lane;
  double sum = 0.0;
  if (col < dim) {
    for (int slab = warp; slab < slabs; slab += kWarps) sum += sums[static_cast<int64_t>(slab) * dim + col];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < dim) {
    for (int other = 1; other < kWarps; ++other) sum += partial[other][lane];
    const double value = sum / static_cast<double>(num_codes);
    mean[col] = isfinite(value) ? value : 0.0;
  }
}

// ||x||^2 of a shifted row by one team; `finite` tells whether all its values are.
template <class T, int lanes>
__device__ __forceinline__ double team_squared_norm(const Points& points, int64_t row, const double* mean,
                                                    bool& finite) {
  double sum = 0.0;
  bool good = true;
  TMM_UNROLL
  for (int col = threadIdx.x % lanes; col < points.dim; col += lanes) {
    const double shifted = points.shifted<T>(row, col, mean[col]);
    good = good && isfinite(points.value<T>(row, col));
    sum = fma(shifted, shifted, sum);
  }
  finite = team_all<lanes>(good);
  return team_sum<lanes>(sum);
}

// The sum over the codes of a warp's stride of the hash of their values, in every lane.
template <class T>
__device__ __forceinline__ uint64_t warp_hash(const Points& codes, int64_t num_codes) {
  uint64_t hash = 0;
  for (int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; code < num_codes;
       code += static_cast<int64_t>(gridDim.x) * kWarps) {
    TMM_UNROLL
    for (int col = threadIdx.x % 32; col < codes.dim; col += 32) {
      hash += hash_value(codes.value<T>(code, col), static_cast<uint64_t>(code) * codes.dim + col);
    }
  }
  for (int step = 16; step > 0; step >>= 1) {
    hash += __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(hash), step);
  }
  return hash;
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) hash_codes(Points codes, int64_t num_codes, uint64_t* total) {
  const uint64_t hash = warp_hash<T>(codes, num_codes);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), hash);
}

// The norms (NaN of a code that must never be chosen), the largest and the smallest of them, and the hash.
template <class T>
__global__ void __launch_bounds__(kPackThreads) code_norms(Points codes, int64_t num_codes, const double* mean,
                                                           double* norms, CodeHeader* header) {
  __shared__ double largest[kWarps], smallest[kWarps];
  __shared__ int overflow;
  const uint64_t hash = warp_hash<T>(codes, num_codes);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(&header->hash), hash);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) overflow = 0;
  __syncthreads();
  double most = 0.0, least = INFINITY;
  for (int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + warp; code < num_codes;
       code += static_cast<int64_t>(gridDim.x) * kWarps) {
    bool finite;
    const double norm = team_squared_norm<T, 32>(codes, code, mean, finite);
    if (lane == 0) norms[code] = finite ? norm : NAN;
    if (finite && norm < INFINITY) {
      most = fmax(most, norm);
      least = fmin(least, norm);
    }
    if (finite && !(norm < INFINITY) && lane == 0) overflow = 1;
  }
  if (lane == 0) {
    largest[warp] = most;
    smallest[warp] = least;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kWarps; ++other) {
      most = fmax(most, largest[other]);
      least = fmin(least, smallest[other]);
    }
    atomicMax(reinterpret_cast<unsigned long long*>(&header->largest_norm), double_bits(most));
    atomicMax(reinterpret_cast<unsigned long long*>(&header->smallest_norm), ~double_bits(least));
    if (overflow) atomicMax(&header->overflow, 1u);
  }
}

// Quantises one shifted row times 2^exponent by one team, and clears the columns from the `width`-th back to the extra
// ones, or all of them if not `keep`; returns ||x^||^2 and ||dX||^2 of the scaled row. Without `out`, nothing is written.
template <class T, int lanes>
__device__ __forceinline__ void team_quantise(const Points& points, int64_t row, const double* mean, int exponent,
                                              bool keep, int width, uint16_t* out, double& quantised,
                                              double& residual) {
  double kept = 0.0, lost = 0.0;
  TMM_UNROLL
  for (int col = threadIdx.x % lanes; col < points.dim; col += lanes) {
    const double exact = ldexp(points.shifted<T>(row, col, mean[col]), exponent);
    const uint16_t half = half_nearest(exact);
    const double value = half_value(half), rest = exact - value;
    if (out) out[col] = keep ? half : 0;
    kept = fma(value, value, kept);
    lost = fma(rest, rest, lost);
  }
  if (out) {
    const int begin = points.dim + (keep ? kExtra : 0);
    for (int col = begin + threadIdx.x % lanes; col < width; col += lanes) out[col] = 0;
  }
  quantised = team_sum<lanes>(kept);
  residual = team_sum<lanes>(lost);
}

// The columns beside the values are made for all rows of a block at once, one thread each: they take long.
template <class T, int lanes>
__global__ void __launch_bounds__(kPackThreads) pack_codes(Points codes, int64_t num_codes, int64_t padded_codes,
                                                           int width, const double* mean, const double* norms,
                                                           const CodeHeader* header, uint16_t* packed) {
  constexpr int kTeamCount = kPackThreads / lanes;
  __shared__ double shared_norm[kTeamCount], shared_residual[kTeamCount];
  const int team = threadIdx.x / lanes;
  const int exponent = code_exponent(bits_double(header->largest_norm));
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kTeamCount; begin < padded_codes;
       begin += static_cast<int64_t>(gridDim.x) * kTeamCount) {
    const int64_t code = begin + team;  // padded_codes is a multiple of the teams
    uint16_t* out = packed + (code / kSpan * kSpan + span_column(static_cast<int>(code % kSpan))) * width;
    const double norm = code < num_codes ? norms[code] : NAN;
    const bool chosen = norm == norm;
    double quantised = 0.0, residual = 0.0;
    team_quantise<T, lanes>(codes, code < num_codes ? code : 0, mean, exponent, chosen, width, out, quantised, residual);
    if (threadIdx.x % lanes == 0) {
      shared_norm[team] = ldexp(norm, 2 * exponent);
      shared_residual[team] = residual;
    }
    __syncthreads();
    if (threadIdx.x < kTeamCount && shared_norm[threadIdx.x] == shared_norm[threadIdx.x]) {
      const int64_t mine = begin + threadIdx.x;
      uint16_t* to = packed + (mine / kSpan * kSpan + span_column(static_cast<int>(mine % kSpan))) * width;
      code_columns(shared_norm[threadIdx.x], shared_residual[threadIdx.x], width, to + codes.dim);
    }
    __syncthreads();
  }
}

// Rows first .. first + num_rows - 1 of the tokens become rows 0 .. of the chunk.
template <class T, int lanes>
__global__ void __launch_bounds__(kPackThreads) pack_rows(Points tokens, int64_t first, int num_rows, int width,
                                                          const double* mean, const CodeHeader* header,
                                                          uint16_t* packed, RowBound* bounds) {
  constexpr int kTeamCount = kPackThreads / lanes;
  __shared__ double shared_norm[kTeamCount], shared_quantised[kTeamCount], shared_residual[kTeamCount];
  const int team = threadIdx.x / lanes;
  const int row = blockIdx.x * kTeamCount + team;
  const int64_t token = first + min(row, num_rows - 1);
  const CodeHeader codes = *header;
  const int code_exp = code_exponent(bits_double(codes.largest_norm));
  bool finite;
  const double norm = team_squared_norm<T, lanes>(tokens, token, mean, finite);
  double quantised = 0.0, residual = 0.0;
  uint16_t* out = row < num_rows ? packed + static_cast<int64_t>(row) * width : nullptr;
  team_quantise<T, lanes>(tokens, token, mean, finite ? row_exponent(norm, code_exp) : 0, finite, width, out, quantised,
                          residual);
  if (threadIdx.x % lanes == 0) {
    shared_norm[team] = finite ? norm : NAN;
    shared_quantised[team] = quantised;
    shared_residual[team] = residual;
  }
  __syncthreads();
  const int mine = blockIdx.x * kTeamCount + threadIdx.x;
  if (threadIdx.x >= kTeamCount || mine >= num_rows) return;
  const double own = shared_norm[threadIdx.x];
  if (own == own) {
    bounds[mine] = row_columns(own, shared_quantised[threadIdx.x], shared_residual[threadIdx.x],
                               row_exponent(own, code_exp), code_exp, codes, tokens.dim, width,
                               packed + static_cast<int64_t>(mine) * width + tokens.dim);
  } else {
    RowBound bound = {};
    bound.status = kNotFinite;
    bounds[mine] = bound;
  }
}

// In place of pack_rows when every code is scored in double precision: only tells which tokens are finite.
__global__ void __launch_bounds__(kPackThreads) check_rows(Points tokens, int64_t first, int num_rows,
                                                           RowBound* bounds) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= num_rows) return;
  bool good = true;
  for (int col = threadIdx.x % 32; col < tokens.dim; col += 32) good = good && isfinite(tokens.value(first + row, col));
  good = team_all<32>(good);
  if (threadIdx.x % 32 == 0) {
    RowBound bound = {};
    bound.status = good ? kExact : kNotFinite;
    bounds[row] = bound;
  }
}

}  // namespace tmm
