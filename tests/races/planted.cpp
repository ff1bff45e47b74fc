// Two races that must be reported, and their right forms, which must not be.
extern "C" {

// A sum over a team, without the reduction and with it.
double sum(const double* x, long n, int wrong) {
  double total = 0;
  if (wrong) {
#pragma omp parallel for num_threads(3)
    for (long i = 0; i < n; ++i) total += x[i];
  } else {
#pragma omp parallel for num_threads(3) reduction(+ : total)
    for (long i = 0; i < n; ++i) total += x[i];
  }
  return total;
}

// Called from several Python threads, for one result or for one each; long enough that two calls meet.
void fill(double* x, long n) {
  for (long k = 0; k < 1000 * n; ++k) x[k % n] += double(k);
}
}
