// Numbers of mathematics that kernels share: exponentials and logarithms are made to the base 2.
#pragma once

namespace specdec {

constexpr double kLog2EDouble = 1.4426950408889634;  // log2(e): exp(x) = 2^(x * log2(e))
constexpr double kLn2Double = 0.6931471805599453;    // ln(2): ln(x) = log2(x) * ln(2)
constexpr float kLog2E = float(kLog2EDouble);
constexpr float kLn2 = float(kLn2Double);

}  // namespace specdec
