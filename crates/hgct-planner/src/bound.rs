//! The compute bound: no plan of these devices can be faster.
//!
//! Let `c[d][l]` be the fewest nanoseconds a sample that device `d` needs for layer `l`, over all
//! micro-batch sizes, and `x[d][l]` the samples a nanosecond that it puts through it. Every layer
//! must pass the same rate X:
//!
//! > maximise X with Σ_d x\[d\]\[l\] = X for every l and Σ_l x\[d\]\[l\]·c\[d\]\[l\] ≤ 1 for every d.
//!
//! Its dual prices each device's time (λ, summing to 1) and each layer (y ≤ λ_d·c\[d\]\[l\] for every
//! d): 1/X = max Σ_l y_l. It is solved by the simplex method; whatever λ comes out, Σ_l min_d λ_d·c
//! is a valid bound by weak duality, so rounding in the solver cannot make it wrong. Blocks are alike
//! and count as one variable.

/// Prices of device time and the bound that they prove.
#[derive(Debug, Clone, PartialEq)]
pub struct ComputeBound {
    /// Price of each device's time; sums to 1.
    pub prices: Vec<f64>,
    /// Priced nanoseconds a sample: nobody does a sample cheaper.
    pub ns_per_sample: f64,
}

impl ComputeBound {
    /// `cost[d]`: nanoseconds a sample of embedding, block and head; `counts`: how many layers of
    /// each there are.
    pub fn new(cost: &[[f64; 3]], counts: [u64; 3]) -> Self {
        let kinds: Vec<usize> = (0..3).filter(|k| counts[*k] > 0).collect();
        let num = cost.len();
        // Variables: λ of each device, then y of each kind. Rows: y_k − λ_d c ≤ 0, then Σ λ ≤ 1.
        let mut rows = Vec::new();
        for (d, of_device) in cost.iter().enumerate() {
            for (at, k) in kinds.iter().enumerate() {
                let mut row = vec![0.0; num + kinds.len()];
                row[d] = -of_device[*k];
                row[num + at] = 1.0;
                rows.push((row, 0.0));
            }
        }
        let mut sum = vec![0.0; num + kinds.len()];
        sum[..num].fill(1.0);
        rows.push((sum, 1.0));
        let mut objective = vec![0.0; num + kinds.len()];
        for (at, k) in kinds.iter().enumerate() {
            objective[num + at] = counts[*k] as f64;
        }
        let solution = maximise(&objective, rows);
        let simplex = normalised(&solution[..num]);
        // Should the solver fail, speed-weighted prices are valid too, only less sharp.
        let plain: Vec<f64> = cost.iter().map(|c| 1.0 / whole(c, counts).max(1e-9)).collect();
        [simplex, normalised(&plain)]
            .into_iter()
            .flatten()
            .map(|prices| {
                let ns_per_sample = Self::priced(&prices, cost, counts);
                Self { prices, ns_per_sample }
            })
            .max_by(|a, b| a.ns_per_sample.total_cmp(&b.ns_per_sample))
            .unwrap_or(Self { prices: vec![0.0; num], ns_per_sample: 0.0 })
    }

    fn priced(prices: &[f64], cost: &[[f64; 3]], counts: [u64; 3]) -> f64 {
        (0..3)
            .filter(|k| counts[*k] > 0)
            .map(|k| {
                let least = prices.iter().zip(cost).map(|(p, c)| p * c[k]).fold(f64::INFINITY, f64::min);
                least * counts[k] as f64
            })
            .sum()
    }

    /// Nanoseconds that a step of `samples` takes at least.
    pub fn step_ns(&self, samples: u32) -> u64 {
        // Leaves room for the rounding of the sums above.
        (self.ns_per_sample * f64::from(samples) * (1.0 - 1e-9)).max(0.0) as u64
    }

    /// Samples that devices with prices summing to `price` can do in `step_ns` at most.
    pub(crate) fn most_samples(&self, price: f64, step_ns: u64) -> f64 {
        if self.ns_per_sample <= 0.0 {
            return f64::INFINITY;
        }
        price * step_ns as f64 * (1.0 + 1e-9) / self.ns_per_sample + 1e-9
    }
}

fn whole(cost: &[f64; 3], counts: [u64; 3]) -> f64 {
    (0..3).map(|k| cost[k] * counts[k] as f64).sum()
}

fn normalised(prices: &[f64]) -> Option<Vec<f64>> {
    let prices: Vec<f64> = prices.iter().map(|p| p.max(0.0)).collect();
    let sum: f64 = prices.iter().sum();
    (sum.is_finite() && sum > 0.0).then(|| prices.iter().map(|p| p / sum).collect())
}

/// Maximises `objective · x` with `row · x ≤ limit` and x ≥ 0; limits are not negative, so that the
/// origin is a start. Bland's rule, so that it ends.
pub(crate) fn maximise(objective: &[f64], rows: Vec<(Vec<f64>, f64)>) -> Vec<f64> {
    let (num, num_rows) = (objective.len(), rows.len());
    let width = num + num_rows + 1;
    let mut table: Vec<Vec<f64>> = Vec::with_capacity(num_rows + 1);
    for (at, (row, limit)) in rows.into_iter().enumerate() {
        let mut line = row;
        line.resize(width, 0.0);
        line[num + at] = 1.0;
        line[width - 1] = limit;
        table.push(line);
    }
    let mut goal: Vec<f64> = objective.iter().map(|c| -c).collect();
    goal.resize(width, 0.0);
    table.push(goal);
    let mut basis: Vec<usize> = (num..num + num_rows).collect();
    let scale: f64 = table.iter().flatten().fold(1.0, |most, x| x.abs().max(most));
    let tiny = 1e-13 * scale;
    for _ in 0..10_000 {
        let Some(enter) = (0..width - 1).find(|j| table[num_rows][*j] < -tiny) else { break };
        let Some(at) = leaving(&table, &basis, enter, 1e-12) else { break };
        pivot(&mut table, at, enter);
        basis[at] = enter;
    }
    let mut solution = vec![0.0; num];
    for (i, variable) in basis.iter().enumerate() {
        if *variable < num {
            solution[*variable] = table[i][width - 1];
        }
    }
    solution
}

/// The row whose variable leaves when `enter` enters: the smallest ratio, of equal ones the first
/// variable. The goal is the row past the last.
pub(crate) fn leaving(table: &[Vec<f64>], basis: &[usize], enter: usize, tiny: f64) -> Option<usize> {
    let mut leave: Option<(f64, usize, usize)> = None;
    for (row, variable) in basis.iter().enumerate() {
        let line = &table[row];
        if line[enter] > tiny {
            let ratio = line[line.len() - 1] / line[enter];
            if leave.is_none_or(|(least, first, _)| (ratio, *variable) < (least, first)) {
                leave = Some((ratio, *variable, row));
            }
        }
    }
    leave.map(|(_, _, row)| row)
}

/// Makes `enter` the variable of row `at`.
pub(crate) fn pivot(table: &mut [Vec<f64>], at: usize, enter: usize) {
    let by = table[at][enter];
    for x in &mut table[at] {
        *x /= by;
    }
    let line = table[at].clone();
    for (i, row) in table.iter_mut().enumerate() {
        let factor = row[enter];
        if i != at && factor != 0.0 {
            for (x, y) in row.iter_mut().zip(&line) {
                *x -= factor * y;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs().max(1.0)
    }

    #[test]
    fn alike_devices_share_evenly() {
        let bound = ComputeBound::new(&[[1.0, 10.0, 4.0]; 3], [1, 8, 1]);
        assert!(close(bound.ns_per_sample, 85.0 / 3.0), "{bound:?}");
    }

    #[test]
    fn a_uniformly_faster_device_adds_its_rate() {
        let bound = ComputeBound::new(&[[2.0, 20.0, 8.0], [1.0, 10.0, 4.0]], [1, 8, 1]);
        // Rates 1/170 and 1/85 add up.
        assert!(close(bound.ns_per_sample, 170.0 / 3.0), "{bound:?}");
    }

    #[test]
    fn kinds_that_are_good_at_different_layers_beat_the_sum_of_their_rates() {
        // Each is ten times faster at what the other is slow at: 1 of work each, not 1 / (2/11).
        let bound = ComputeBound::new(&[[0.0, 1.0, 10.0], [0.0, 10.0, 1.0]], [1, 1, 1]);
        assert!(close(bound.ns_per_sample, 1.0), "{bound:?}");
    }

    #[test]
    fn nothing_costs_nothing() {
        assert!(ComputeBound::new(&[], [1, 2, 1]).ns_per_sample.abs() < 1e-12);
        assert!(ComputeBound::new(&[[0.0; 3]], [1, 2, 1]).ns_per_sample.abs() < 1e-12);
    }
}
