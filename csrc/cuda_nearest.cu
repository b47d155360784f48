// The C interface: validates, cuts a call into chunks of rows and queues the kernels.
#include "cuda_nearest.h"
#include "cuda_pass_hopper.cuh"
#include "cuda_pass_portable.cuh"
#include "cuda_rescore.cuh"

namespace tmm {
namespace {

#define TMM_CHECK(call)                          \
  do {                                           \
    const cudaError_t status = (call);           \
    if (status != cudaSuccess) return status;    \
  } while (0)

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

bool valid_matrices(const tmm_cuda_matrix* matrices, const double* weights, int parts) {
  if (!matrices || !weights || parts < 1 || parts > 2) return false;
  int64_t dim = 0;
  for (int p = 0; p < parts; ++p) {
    const tmm_cuda_matrix& matrix = matrices[p];
    if (matrix.cols < 1 || matrix.rows < 0 || matrix.rows != matrices[0].rows) return false;
    if (matrix.dtype < TMM_CUDA_F32 || matrix.dtype > TMM_CUDA_BF16) return false;
    if (!(weights[p] >= 0.0) || !(weights[p] < INFINITY)) return false;
    dim += matrix.cols;
  }
  return dim <= (1 << 24);
}

template <class T>
T* at(void* base, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function that describes a matrix to the copy engine; null where the driver has none. No link to
// libcuda.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<EncodeTiled>(function);
}

EncodeTiled encode_tiled() {
  static const EncodeTiled function = find_encode_tiled();
  return function;
}

// fp16 [rows, width], row-major, in boxes of box_rows x 64 with the 128-byte swizzle; zeros beyond the edges.
bool tensor_map(CUtensorMap* map, const void* data, int64_t rows, int width, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[2] = {hopper::kDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int blocks_for(int64_t items, int per_block) { return static_cast<int>((items + per_block - 1) / per_block); }

// Blocks of the kernels that give a warp, or a narrow team, to every code.
int code_blocks(const Plan& plan, int per_block = kWarps) {
  const int blocks = blocks_for(plan.padded_codes, per_block);
  return blocks < 1024 ? blocks : 1024;
}

cudaError_t run_pass(const Pass& pass, bool use_hopper, int processors, cudaStream_t stream) {
  const int units = pass.row_tiles * pass.segments;
  if (use_hopper) {
    CUtensorMap row_map, code_map;
    if (!tensor_map(&row_map, pass.rows, pass.num_rows, pass.width, kRowTile) ||
        !tensor_map(&code_map, pass.codes, static_cast<int64_t>(pass.tiles) * kTile, pass.width, kTile)) {
      return cudaErrorInvalidValue;
    }
    using Kernel = void (*)(Pass, CUtensorMap, CUtensorMap);
    constexpr Kernel by_tail[4] = {hopper::search_pass<1>, hopper::search_pass<2>, hopper::search_pass<3>,
                                   hopper::search_pass<4>};
    const Kernel kernel = by_tail[(pass.width / 16 - 1) % 4];
    TMM_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, hopper::kSharedBytes));
    const int blocks = units < processors ? units : processors;
    return launch(kernel, blocks, hopper::kThreads, hopper::kSharedBytes, stream, pass, row_map, code_map);
  }
  TMM_CHECK(cudaFuncSetAttribute(portable::search_pass, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 portable::kSharedBytes));
  const int blocks = units < 2 * processors ? units : 2 * processors;
  return launch(portable::search_pass, blocks, portable::kThreads, portable::kSharedBytes, stream, pass);
}

// AUTO resolved for a device; a pass that the device cannot run is an error.
cudaError_t choose_pass(int device, int* pass) {
  int major;
  TMM_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  int minor;
  TMM_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const bool can_hopper = major == 9 && minor == 0 && encode_tiled() != nullptr;
  if (major < 8 || (*pass == TMM_CUDA_HOPPER && !can_hopper)) return cudaErrorNotSupported;
  if (*pass == TMM_CUDA_AUTO) *pass = can_hopper ? TMM_CUDA_HOPPER : TMM_CUDA_PORTABLE;
  return cudaSuccess;
}

template <class T, int lanes>
cudaError_t pack_as(const Points& codes, int64_t num_codes, void* packed, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  TMM_CHECK(guard.status());
  const Plan plan = make_plan(0, num_codes, codes.dim);
  CodeHeader* header = at<CodeHeader>(packed, 0);
  double* mean = at<double>(packed, plan.mean_at);
  double* sums = at<double>(packed, plan.sums_at);
  double* norms = at<double>(packed, plan.norms_at);
  TMM_CHECK(cudaMemsetAsync(header, 0, sizeof(CodeHeader), stream));
  const int columns = blocks_for(codes.dim, 32);
  TMM_CHECK(
      launch(slab_sums<T>, dim3(columns, plan.slabs), kPackThreads, 0, stream, codes, num_codes, plan.slabs, sums));
  TMM_CHECK(launch(mean_of_slabs, columns, kPackThreads, 0, stream, sums, plan.slabs, codes.dim, num_codes, mean));
  TMM_CHECK(launch(code_norms<T>, code_blocks(plan), kPackThreads, 0, stream, codes, num_codes, mean, norms, header));
  if (plan.exact_only) return cudaSuccess;
  return launch(pack_codes<T, lanes>, code_blocks(plan, kPackThreads / lanes), kPackThreads, 0, stream, codes, num_codes,
                plan.padded_codes, plan.width, mean, norms, header, at<uint16_t>(packed, plan.codes_at));
}

cudaError_t pack(const Points& codes, int64_t num_codes, void* packed, int device, cudaStream_t stream) {
  const bool narrow = codes.dim <= kNarrow;
  const auto pack = codes.all_float() ? (narrow ? pack_as<float, kNarrowTeam> : pack_as<float, 32>)
                                      : (narrow ? pack_as<AnyType, kNarrowTeam> : pack_as<AnyType, 32>);
  return pack(codes, num_codes, packed, device, stream);
}

template <class T>
cudaError_t pack_chunk(const Points& tokens, int64_t first, int count, int width, const double* mean,
                       const CodeHeader* header, uint16_t* rows, RowBound* bounds, cudaStream_t stream) {
  const bool narrow = tokens.dim <= kNarrow;
  const auto kernel = narrow ? pack_rows<T, kNarrowTeam> : pack_rows<T, 32>;
  const int blocks = blocks_for(count, kPackThreads / (narrow ? kNarrowTeam : 32));
  return launch(kernel, blocks, kPackThreads, 0, stream, tokens, first, count, width, mean, header, rows, bounds);
}

template <class T>
cudaError_t finish(const Search& search, int processors, cudaStream_t stream) {
  const auto rows = search.margins ? finish_rows<T, true> : finish_rows<T, false>;
  const auto listed = search.margins ? finish_listed<T, true> : finish_listed<T, false>;
  TMM_CHECK(launch(rows, blocks_for(search.num_rows, kWarps), kPackThreads, 0, stream, search));
  // The list's length stays on the device: a fixed grid walks it.
  const int items = search.num_rows <= kSplitRows ? kPartials : blocks_for(search.num_rows, kSetRows);
  return launch(listed, items < 4 * processors ? items : 4 * processors, kPackThreads, 0, stream, search);
}

// `search` comes with the tokens, the codes and the outputs.
cudaError_t nearest(Search search, int64_t num_rows, void* packed, bool check, void* workspace, int pass_choice,
                    int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  TMM_CHECK(guard.status());
  TMM_CHECK(choose_pass(device, &pass_choice));
  int processors;
  TMM_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const Points& tokens = search.tokens;
  const Plan plan = make_plan(num_rows, search.num_codes, tokens.dim);
  CodeHeader* header = at<CodeHeader>(packed, 0);
  double* mean = at<double>(packed, plan.mean_at);
  uint16_t* rows = at<uint16_t>(workspace, plan.rows_at);
  RowBound* bounds = at<RowBound>(workspace, plan.bounds_at);

  uint64_t* hash = at<uint64_t>(workspace, plan.hash_at);
  search.exact_only = plan.exact_only || pass_choice == TMM_CUDA_EXACT;
  search.streams = plan.streams();
  search.segments = plan.segments;
  search.segment_tiles = plan.segment_tiles;
  search.tiles = plan.tiles;
  search.bounds = bounds;
  search.records = at<Record>(workspace, plan.records_at);
  search.best = at<Best>(workspace, plan.best_at);
  search.partial = at<Best>(workspace, plan.partial_at);
  search.finished = at<int32_t>(workspace, plan.finished_at);
  search.list = at<int32_t>(workspace, plan.list_at);
  search.packed_hash = packed ? &header->hash : nullptr;
  search.found_hash = check ? hash : nullptr;
  if (check) {
    TMM_CHECK(cudaMemsetAsync(hash, 0, sizeof(uint64_t), stream));
    const auto kernel = search.codes.all_float() ? hash_codes<float> : hash_codes<AnyType>;
    TMM_CHECK(launch(kernel, code_blocks(plan), kPackThreads, 0, stream, search.codes, search.num_codes, hash));
  }

  for (int64_t first = 0; first < num_rows; first += plan.chunk_rows) {
    const int count = static_cast<int>(num_rows - first < plan.chunk_rows ? num_rows - first : plan.chunk_rows);
    search.first = first;
    search.num_rows = count;
    TMM_CHECK(cudaMemsetAsync(search.finished, 0, kSplitRows * 4 + sizeof(int32_t), stream));
    if (search.exact_only) {
      TMM_CHECK(launch(check_rows, blocks_for(count, kWarps), kPackThreads, 0, stream, tokens, first, count, bounds));
    } else {
      const auto pack = tokens.all_float() ? pack_chunk<float> : pack_chunk<AnyType>;
      TMM_CHECK(pack(tokens, first, count, plan.width, mean, header, rows, bounds, stream));
      Pass pass;
      pass.rows = rows;
      pass.codes = at<uint16_t>(packed, plan.codes_at);
      pass.records = at<Record>(workspace, plan.records_at);
      pass.num_rows = count;
      pass.width = plan.width;
      pass.tiles = plan.tiles;
      pass.segments = plan.segments;
      pass.segment_tiles = plan.segment_tiles;
      pass.row_tiles = blocks_for(count, kRowTile);
      TMM_CHECK(run_pass(pass, pass_choice == TMM_CUDA_HOPPER, processors, stream));
    }
    const bool all_float = tokens.all_float() && search.codes.all_float();
    TMM_CHECK((all_float ? finish<float> : finish<AnyType>)(search, processors, stream));
  }
  return cudaSuccess;
}

// One thread per (code, column), so the order of the additions is the order of the rows.
template <class T>
__global__ void __launch_bounds__(128) sum_by_code(tmm_cuda_matrix vectors, const int64_t* order, const int64_t* begin,
                                                   int64_t num_codes, double* sums, tmm_cuda_faults* faults) {
  const int64_t total = num_codes * vectors.cols;
  if (blockIdx.x == 0 && threadIdx.x == 0 && faults && (begin[0] != 0 || begin[num_codes] != vectors.rows)) {
    faults->bad_ids = 1;
  }
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t code = index / vectors.cols, col = index % vectors.cols;
    const int64_t end = begin[code + 1];
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = begin[code]; i < end; ++i) sum += element<T>(vectors, order[i], col);
    sums[index] = sum;
  }
}

}  // namespace
}  // namespace tmm

extern "C" {

int tmm_cuda_abi_version(void) { return TMM_CUDA_ABI_VERSION; }

const char* tmm_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int64_t tmm_cuda_packed_bytes(int64_t num_codes, int64_t dim) { return tmm::make_plan(0, num_codes, dim).packed_bytes; }

int64_t tmm_cuda_workspace_bytes(int64_t num_rows, int64_t num_codes, int64_t dim) {
  return tmm::make_plan(num_rows, num_codes, dim).workspace_bytes;
}

int tmm_cuda_pack(const tmm_cuda_matrix* codes, const double* weights, int parts, void* packed, int device,
                  void* stream) {
  if (!tmm::valid_matrices(codes, weights, parts) || codes[0].rows < 1 || !packed) return cudaErrorInvalidValue;
  return tmm::pack(tmm::make_points(codes, weights, parts), codes[0].rows, packed, device,
                   static_cast<cudaStream_t>(stream));
}

int tmm_cuda_nearest(const tmm_cuda_matrix* tokens, const tmm_cuda_matrix* codes, const double* weights, int parts,
                     const void* packed, int check, void* workspace, int64_t* ids, double* distances, double* margins,
                     tmm_cuda_faults* faults, int pass, int device, void* stream) {
  if (!tmm::valid_matrices(tokens, weights, parts) || !tmm::valid_matrices(codes, weights, parts)) {
    return cudaErrorInvalidValue;
  }
  for (int p = 0; p < parts; ++p) {
    if (tokens[p].cols != codes[p].cols) return cudaErrorInvalidValue;
  }
  if (codes[0].rows < 1 || codes[0].rows > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (pass < TMM_CUDA_AUTO || pass > TMM_CUDA_EXACT) return cudaErrorInvalidValue;
  if (tokens[0].rows == 0) return cudaSuccess;
  if (!workspace || !ids || (!packed && (check || pass != TMM_CUDA_EXACT))) return cudaErrorInvalidValue;
  tmm::Search search = {};
  search.tokens = tmm::make_points(tokens, weights, parts);
  search.codes = tmm::make_points(codes, weights, parts);
  search.num_codes = codes[0].rows;
  search.ids = ids;
  search.distances = distances;
  search.margins = margins;
  search.faults = faults;
  return tmm::nearest(search, tokens[0].rows, const_cast<void*>(packed), check != 0, workspace, pass, device,
                      static_cast<cudaStream_t>(stream));
}

int tmm_cuda_code_sums(const tmm_cuda_matrix* vectors, const int64_t* order, const int64_t* begin, int64_t num_codes,
                       double* sums, tmm_cuda_faults* faults, int device, void* stream) {
  const double weight = 1.0;
  if (!tmm::valid_matrices(vectors, &weight, 1) || num_codes < 1) return cudaErrorInvalidValue;
  const tmm::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int64_t blocks = (num_codes * vectors->cols + 127) / 128;
  const auto kernel = vectors->dtype == TMM_CUDA_F32 ? tmm::sum_by_code<float> : tmm::sum_by_code<tmm::AnyType>;
  return tmm::launch(kernel, static_cast<int>(blocks < 65536 ? blocks : 65536), 128, 0,
                     static_cast<cudaStream_t>(stream), *vectors, order, begin, num_codes, sums, faults);
}

}  // extern "C"
