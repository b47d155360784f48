// C interface of libtokenizers_mm_cuda. Every pointer named `device` is CUDA memory of the device given in the call;
// all work is queued on the stream given in the call, nothing waits for the device, and all memory is the caller's.
#ifndef TOKENIZERS_MM_CUDA_NEAREST_H
#define TOKENIZERS_MM_CUDA_NEAREST_H

#include <stdint.h>

#if defined(__GNUC__)
#define TMM_CUDA_API __attribute__((visibility("default")))
#else
#define TMM_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TMM_CUDA_ABI_VERSION 2

enum { TMM_CUDA_F32 = 0, TMM_CUDA_F64 = 1, TMM_CUDA_F16 = 2, TMM_CUDA_BF16 = 3 };
// The tensor-core pass: AUTO takes HOPPER on compute capability 9.0 and PORTABLE elsewhere (8.0 and up). EXACT scores
// every code in double precision; it serves widths beyond the pass and is the oracle on the device.
enum { TMM_CUDA_AUTO = 0, TMM_CUDA_PORTABLE = 1, TMM_CUDA_HOPPER = 2, TMM_CUDA_EXACT = 3 };

// A matrix [rows, cols] in device memory; strides count elements.
typedef struct {
  const void* device;
  int64_t rows, cols, row_stride, col_stride;
  int32_t dtype;
} tmm_cuda_matrix;

// Faults that kernels noticed, for the host to read whenever it likes: pinned host memory that kernels write 1 to.
// The caller zeroes it. `stale`: the packed codebook is not the one that was given (the answers are right all the
// same, in double precision throughout). `bad_ids`: an id is no code of the codebook.
typedef struct {
  int32_t stale, bad_ids;
} tmm_cuda_faults;

TMM_CUDA_API int tmm_cuda_abi_version(void);
// The text of a code returned below; 0 is success, other values are cudaError_t.
TMM_CUDA_API const char* tmm_cuda_error_string(int code);

// Bytes of a packed codebook of `num_codes` codes whose parts have `dim` values together.
TMM_CUDA_API int64_t tmm_cuda_packed_bytes(int64_t num_codes, int64_t dim);
// Bytes of scratch memory that tmm_cuda_nearest needs; bounded for any number of rows.
TMM_CUDA_API int64_t tmm_cuda_workspace_bytes(int64_t num_rows, int64_t num_codes, int64_t dim);

// Packs one codebook, or two codebooks that share an index (`parts` 1 or 2). `packed` must be 256-byte aligned.
TMM_CUDA_API int tmm_cuda_pack(const tmm_cuda_matrix* codes, const double* weights, int parts, void* packed, int device,
                               void* stream);

// ids[i] = argmin_k sum_p weights[p] * ||tokens[p][i] - codes[p][k]||^2 as computed in double precision from the
// difference form, ties to the lowest k. A code with a NaN or an infinity is never chosen; a token with one gets index
// -1, distance and margin NaN; a token without a finite distance to any code index 0, distance infinity and margin 0.
// margins[i] is how much farther (the root of the distance) the nearest code is that differs from code ids[i] in some
// value; infinity where none does at a finite distance. `distances`, `margins` and `faults` may be null.
// `packed` is what tmm_cuda_pack made of the same codes and weights; with `check`, a hash of the codes is compared on
// the device with the one taken when they were packed. The exact pass without `check` needs none: null. `workspace`
// must be 256-byte aligned.
TMM_CUDA_API int tmm_cuda_nearest(const tmm_cuda_matrix* tokens, const tmm_cuda_matrix* codes, const double* weights,
                                  int parts, const void* packed, int check, void* workspace, int64_t* ids,
                                  double* distances, double* margins, tmm_cuda_faults* faults, int pass, int device,
                                  void* stream);

// sums[k, :] = the rows order[begin[k]], ..., order[begin[k + 1] - 1] of `vectors`, added in that order in double
// precision. `order` sorts the rows by code (stable), `begin` has num_codes + 1 entries, `sums` is [num_codes, cols],
// row-major. Rows outside begin[0] .. begin[num_codes] - 1 count for no code and set faults->bad_ids.
TMM_CUDA_API int tmm_cuda_code_sums(const tmm_cuda_matrix* vectors, const int64_t* order, const int64_t* begin,
                                    int64_t num_codes, double* sums, tmm_cuda_faults* faults, int device,
                                    void* stream);

#ifdef __cplusplus
}
#endif
#endif
