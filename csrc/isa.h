// One kernel source, compiled once per instruction set.
//
// setup.py compiles every kernel file several times with different -m flags and -DSADCL_ISA=<name>. All that such a
// file defines lives in namespace sadcl::SADCL_ISA, so the copies never meet in the linker. The same must hold for
// what it includes: an inline function of the standard library compiled here with AVX-512 flags is a weak symbol that
// the linker may choose for *everybody*, and then the portable path dies with SIGILL. Hence the rule for these files:
// C headers, plain structs and our own templates only.
#pragma once
#include "kernels.h"

#ifndef SADCL_ISA
#define SADCL_ISA portable
#endif

#define SADCL_KERNELS_BEGIN \
  namespace sadcl {         \
  namespace SADCL_ISA {
#define SADCL_KERNELS_END \
  }                       \
  }

// float64 is there for gradcheck, at any speed: only the portable copy carries it, which saves a quarter of the build.
#ifdef SADCL_FLOAT64
#define SADCL_BY_DTYPE(name, function, dtype, args) ((dtype) == kF64 ? function<double>(args) : function<float>(args))
#else
#define SADCL_BY_DTYPE(name, function, dtype, args) ((dtype) == kF64 ? portable::name(args) : function<float>(args))
#endif

#define SADCL_INLINE inline __attribute__((always_inline))
