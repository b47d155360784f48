// C interface of libtokenizers_mm: raw pointers and sizes only, so that one library serves every Python and every torch.
#ifndef TOKENIZERS_MM_H
#define TOKENIZERS_MM_H

#include <stdint.h>

#if defined(__GNUC__)
#define TMM_API __attribute__((visibility("default")))
#else
#define TMM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TMM_ABI_VERSION 3

enum { TMM_OK = 0, TMM_NO_MEMORY = 1, TMM_BAD_ARGUMENT = 2, TMM_BAD_QUERY = 3, TMM_BAD_CODES = 4 };
enum { TMM_F32 = 0, TMM_F64 = 1 };
// AUTO lets a probe choose. The others pin one method: they exist for tests and for measuring.
enum { TMM_AUTO = 0, TMM_INT8 = 1, TMM_INT16 = 2, TMM_FLOAT32 = 3, TMM_DIFFERENCE = 4, TMM_TREE = 5, TMM_BRUTE = 6 };

typedef struct tmm_codebook tmm_codebook;

TMM_API int tmm_abi_version(void);
// The instruction set in use: "avx512_amx", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dot", "neon" or "portable".
TMM_API const char* tmm_isa(void);
// Pins the instruction set of codebooks created from now on; TMM_BAD_ARGUMENT when this CPU lacks it. For tests.
TMM_API int tmm_select_isa(const char* name);

// 128 bits of a digest of `rows` runs of `bytes` each, `stride` bytes apart: the same for the same memory in the same process,
// for any number of threads.
TMM_API int tmm_digest(const void* data, int64_t rows, int64_t bytes, int64_t stride, uint64_t* digest, int threads);

// A packed codebook of k rows of d values. Nothing is packed before the first search and no pointer into `codes` is kept; every
// search must be given the same content (compare digests). Searches of one codebook may run in several threads at once.
TMM_API tmm_codebook* tmm_codebook_create(int64_t k, int64_t d, int dtype, int method);
TMM_API void tmm_codebook_destroy(tmm_codebook* codebook);
TMM_API int64_t tmm_codebook_bytes(const tmm_codebook* codebook);
// The method of the last search (one of the enum above).
TMM_API int tmm_codebook_method(const tmm_codebook* codebook);

// ids[i] = argmin_k ||z_i - c_k||^2, ties to the lowest k; distance (may be null) gets the squared distance in the given dtype,
// margin (may be null) how much farther the nearest code of another value is, not squared: infinity where there is none. z and
// codes are row-major and contiguous, both of the dtype named at creation. TMM_BAD_CODES: a code holds NaN or infinity, nothing
// was searched. TMM_BAD_QUERY: some rows of z do; their ids are -1, their distances and margins NaN.
TMM_API int tmm_nearest_code(tmm_codebook* codebook, const void* codes, const void* z, int64_t n, int64_t* ids, void* distance,
                             void* margin, int threads);

// The same without packing, in one pass over the codes: for one or two rows, and for codes that are searched once.
TMM_API int tmm_nearest_code_live(const void* codes, int64_t k, int64_t d, int dtype, const void* z, int64_t n, int64_t* ids,
                                  void* distance, void* margin, int threads);

// counts[k] = #{i: ids[i] = k}; sums[k] = sum of those rows, added in the order of i in double precision.
// TMM_BAD_ARGUMENT when an id is outside [0, k).
TMM_API int tmm_code_sums(const void* vectors, int dtype, const int64_t* ids, int64_t n, int64_t d, int64_t k,
                          int64_t* counts, double* sums, int threads);

// Means over the windows inside of each pair of planes [height, width], contiguous, of SSIM and of its contrast-structure factor,
// in double precision: the same bits for any number of threads or planes. line: k weights, symmetric, sum 1, of a window along one
// axis. c1, c2: the constants of SSIM. offset: is added to both planes. TMM_BAD_ARGUMENT: no window fits, or a line that is not
// symmetric or has more than 64 weights.
TMM_API int tmm_ssim(const void* x, const void* y, int dtype, int64_t planes, int64_t height, int64_t width, const double* line,
                     int64_t k, double c1, double c2, double offset, double* whole, double* contrast, int threads);

#ifdef __cplusplus
}
#endif
#endif
