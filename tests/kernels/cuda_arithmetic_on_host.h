// CUDA's bit counts, and its arithmetic that rounds after every step.

static int __ffs(unsigned bits) { return __builtin_ffs(bits); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
static double __dmul_rn(double a, double b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static double __dadd_rn(double a, double b) { return a + b; }
