// Products of small row-major matrices on one thread, with torch's micro-kernels (oneDNN's brgemm).
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace lightkit::cpu::linear_cross_entropy {

// C [m, n] = A [m, k] B [k, n], or C += A B with `accumulate`. Rows are `lda`, `ldb` and `ldc` apart. The value of an
// element of C does not depend on m and n. It uses no threads of a BLAS.
void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const float* a,
    int64_t lda,
    const float* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate);
void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const double* a,
    int64_t lda,
    const double* b,
    int64_t ldb,
    double* c,
    int64_t ldc,
    bool accumulate);

// The same with pairs of rows in B [k / 2, n, 2], `2 * ldb` apart; k is even.
void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    const at::BFloat16* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate);

// Returns true if this machine multiplies bfloat16 natively. Elsewhere the product above must not be called.
bool has_bfloat16_gemm();

// Releases the AMX registers of the calling thread; called after its last product.
void end_tile_gemm();

}  // namespace lightkit::cpu::linear_cross_entropy
