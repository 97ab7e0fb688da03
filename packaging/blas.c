/*
 * What numpy asks of a BLAS, for the one file: the dot products that ctrace uses, by
 * np.convolve. OpenBLAS is larger than all the rest together, and takes memory at its
 * start. Any other call ends the program: none may be wrong in silence.
 */
#include <stdint.h>
#include <unistd.h>

double scipy_cblas_ddot64_(int64_t n, const double *x, int64_t dx, const double *y, int64_t dy)
{
	double sum = 0;

	for (int64_t i = 0; i < n; i++)
		sum += x[i * dx] * y[i * dy];
	return sum;
}

float scipy_cblas_sdot64_(int64_t n, const float *x, int64_t dx, const float *y, int64_t dy)
{
	double sum = 0;

	for (int64_t i = 0; i < n; i++)
		sum += (double)x[i * dx] * y[i * dy];
	return (float)sum;
}

static void missing(const char *name, unsigned long size)
{
	static const char text[] = "ctrace: linear algebra is not in this file: ";

	if (write(2, text, sizeof(text) - 1) && write(2, name, size) && write(2, "\n", 1))
		_exit(1);
	_exit(1);
}

#define MISSING(name) \
	void name(void) { missing(#name, sizeof(#name) - 1); }
#include "blas-missing.h"
