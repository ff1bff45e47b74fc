// A tool of OpenMP's tool interface (OMPT): writes "offset-in-library team-size" of every parallel region that began,
// to the file that SADCL_TEAMS names.
#include <dlfcn.h>
#include <omp-tools.h>
#include <stdint.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

static std::mutex guard;
static std::set<std::pair<uintptr_t, unsigned>> seen;

static void begun(ompt_data_t*, const ompt_frame_t*, ompt_data_t*, unsigned team, int, const void* returns_to) {
  Dl_info library;
  const uintptr_t at = reinterpret_cast<uintptr_t>(returns_to);
  if (!dladdr(returns_to, &library)) return;
  const std::lock_guard<std::mutex> lock(guard);
  seen.insert({at - reinterpret_cast<uintptr_t>(library.dli_fbase), team});
}

static int start(ompt_function_lookup_t lookup, int, ompt_data_t*) {
  const auto set = reinterpret_cast<ompt_set_callback_t>(lookup("ompt_set_callback"));
  set(ompt_callback_parallel_begin, reinterpret_cast<ompt_callback_t>(begun));
  return 1;
}

static void finish(ompt_data_t*) {
  FILE* file = std::fopen(std::getenv("SADCL_TEAMS"), "w");
  for (const auto& [offset, team] : seen) std::fprintf(file, "%zx %u\n", size_t(offset), team);
  std::fclose(file);
}

extern "C" ompt_start_tool_result_t* ompt_start_tool(unsigned, const char*) {
  static ompt_start_tool_result_t tool = {start, finish, {0}};
  return &tool;
}
