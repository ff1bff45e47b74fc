// Which instruction set runs: the best the processor has, or what SADCL_CPU_ISA or set_isa asks for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sadcl {

// The table in use. Throws std::invalid_argument if SADCL_CPU_ISA names something that cannot run here.
const KernelTable& kernels();

void set_isa(const std::string& name);      // throws std::invalid_argument
std::vector<std::string> supported_isas();  // that this processor can run, best first
std::vector<std::string> compiled_isas();   // that this build holds, best first

}  // namespace sadcl
