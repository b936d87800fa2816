// The cosine schedule and the sampling grid, for the page and for its worker.

// abar_0..abar_T of the cosine schedule, its factors clipped as in bilevel_core/schedules.py
function cosine([start, end, tau, epsilon], T, maxBeta) {
  const F = (u) => 2 * tau * Math.log(Math.sin(Math.min(1, Math.max(1e-300, 1 - (start + u * (end - start) + epsilon) / (1 + epsilon))) * (Math.PI / 2)));
  const abar = [1];
  let sum = 0;
  for (let t = 1; t <= T; t += 1) {
    const beta = Math.min(maxBeta, Math.max(0, -Math.expm1(F(t / T) - F((t - 1) / T))));
    abar.push(Math.exp((sum += Math.log1p(-beta))));
  }
  return abar;
}
// round half to even, as Python does: the trailing grid T = t_1 > ... > t_N
function timesteps(T, N) {
  return Array.from({ length: N }, (_, i) => {
    const v = T - (i * T) / N, low = Math.floor(v), part = v - low;
    return part < 0.5 || (part === 0.5 && low % 2 === 0) ? low : low + 1;
  });
}
