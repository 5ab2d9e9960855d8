#define EDGERT_AVX512_ENCODING
#include "isa_avx2_vnni.cpp"
