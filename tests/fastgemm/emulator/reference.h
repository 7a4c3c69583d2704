// What a product should be, bit for bit.
#pragma once

#include "product.h"

namespace emulator {

// Fails at the first element of the output that differs.  `params` is what the kernel was launched with: with group scales
// the sum of a tile that a cluster shares is rounded elsewhere than that of one CTA.
void check_output(const Product& product, const fg::sm90::Params& params);

// `value` rounded to the output type, in the low bits.
uint32_t output_bits(int out_dtype, float value);

float value_of_output_bits(int out_dtype, uint32_t bits);

}  // namespace emulator
