//! How many pipelines of each form: the linear programme and its whole numbers.

use crate::bound::{leaving, pivot};

use super::Meter;

/// Something that uses resources and yields samples.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Column {
    pub(crate) used: Vec<u32>,
    pub(crate) samples: u64,
}

/// Solution of `max Σ samples·x` with `Σ used·x ≤ limits`, x ≥ 0.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Relaxed {
    pub(crate) value: f64,
    pub(crate) counts: Vec<f64>,
    /// Samples that one more device of each pool would give.
    pub(crate) prices: Vec<f64>,
}

/// Simplex method from the origin; the largest coefficient enters, after many steps the first one
/// (Bland), so that it ends.
pub(crate) fn relaxed(columns: &[Column], limits: &[u64]) -> Relaxed {
    let (num, rows) = (columns.len(), limits.len());
    let width = num + rows + 1;
    let mut table = vec![vec![0.0; width]; rows + 1];
    for (row, limit) in limits.iter().enumerate() {
        for (at, column) in columns.iter().enumerate() {
            table[row][at] = f64::from(column.used[row]);
        }
        table[row][num + row] = 1.0;
        table[row][width - 1] = *limit as f64;
    }
    for (at, column) in columns.iter().enumerate() {
        table[rows][at] = -(column.samples as f64);
    }
    let mut basis: Vec<usize> = (num..num + rows).collect();
    for step in 0..2000 {
        let goal = &table[rows];
        let enter = if step < 400 {
            (0..width - 1).min_by(|a, b| goal[*a].total_cmp(&goal[*b])).filter(|j| goal[*j] < -1e-9)
        } else {
            (0..width - 1).find(|j| goal[*j] < -1e-9)
        };
        let Some(enter) = enter else { break };
        let Some(at) = leaving(&table, &basis, enter, 1e-9) else { break };
        pivot(&mut table, at, enter);
        basis[at] = enter;
    }
    let mut counts = vec![0.0; num];
    for (row, variable) in basis.iter().enumerate() {
        if *variable < num {
            counts[*variable] = table[row][width - 1].max(0.0);
        }
    }
    let prices = (0..rows).map(|row| table[rows][num + row].max(0.0)).collect();
    Relaxed { value: table[rows][width - 1], counts, prices }
}

/// States of the whole-number programme at most.
const MAX_STATES: u64 = 40_000;
/// Columns that it considers.
const MAX_COLUMNS: usize = 48;

/// Whole numbers: the relaxed solution rounded down as far as must be, and an exact programme over
/// the devices that are left. `None` when out of nodes.
pub(crate) fn whole(
    columns: &[Column],
    limits: &[u64],
    relaxed: &Relaxed,
    meter: &mut Meter<'_>,
) -> Option<Vec<u32>> {
    let mut order: Vec<usize> = (0..columns.len()).filter(|c| columns[*c].samples > 0).collect();
    // What each column loses against the prices, a sample that it gives.
    let loss = |c: &usize| {
        let column = &columns[*c];
        let cost: f64 = column.used.iter().zip(&relaxed.prices).map(|(u, p)| f64::from(*u) * p).sum();
        (cost - column.samples as f64) / column.samples as f64
    };
    order.sort_by(|a, b| loss(a).total_cmp(&loss(b)).then(a.cmp(b)));
    order.truncate(MAX_COLUMNS);
    let mut counts = vec![0u32; columns.len()];
    let mut left = limits.to_vec();
    let units: Vec<u64> = (0..limits.len())
        .map(|pool| u64::from(order.iter().fold(0, |unit, c| gcd(unit, columns[*c].used[pool])).max(1)))
        .collect();
    let states = |left: &[u64]| -> u64 {
        left.iter().zip(&units).fold(1, |all: u64, (n, unit)| all.saturating_mul(n / unit + 1))
    };
    // Round down with ever less room for the exact part until it is small enough.
    for room in (0..=6u32).rev() {
        let mut rest = limits.to_vec();
        counts.fill(0);
        for c in &order {
            let num = (relaxed.counts[*c] + 1e-6).floor() as u32;
            let num = if states(limits) <= MAX_STATES { 0 } else { num.saturating_sub(room) };
            counts[*c] = num;
            for (rest, used) in rest.iter_mut().zip(&columns[*c].used) {
                *rest -= (u64::from(*used) * u64::from(num)).min(*rest);
            }
        }
        left = rest;
        if states(&left) <= MAX_STATES {
            break;
        }
    }
    // What cannot be held is left unused in the last pools' favour: halve the largest until it fits.
    while states(&left) > MAX_STATES {
        let at = (0..left.len()).max_by_key(|p| left[*p] / units[*p])?;
        left[at] /= 2;
    }
    meter.spend(states(&left) * order.len() as u64 / 8)?;
    for (c, num) in knapsack(columns, &order, &left, &units) {
        counts[c] += num;
    }
    Some(counts)
}

/// The greatest common divisor; of nothing (0) and a number, the number.
pub(crate) fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The most samples from the devices that are left, each column any number of times.
fn knapsack(columns: &[Column], order: &[usize], left: &[u64], units: &[u64]) -> Vec<(usize, u32)> {
    let sizes: Vec<usize> = left.iter().zip(units).map(|(n, unit)| (n / unit) as usize + 1).collect();
    let mut strides = vec![1usize; sizes.len()];
    for at in 1..sizes.len() {
        strides[at] = strides[at - 1] * sizes[at - 1];
    }
    let total: usize = sizes.iter().product();
    // (offset, use in units, samples, column) of what fits at all.
    let usable: Vec<(usize, Vec<usize>, u64, usize)> = order
        .iter()
        .filter_map(|c| {
            let used: Vec<usize> =
                columns[*c].used.iter().zip(units).map(|(u, unit)| (u64::from(*u) / unit) as usize).collect();
            let fits = used.iter().zip(&sizes).all(|(u, size)| u < size);
            let offset = used.iter().zip(&strides).map(|(u, stride)| u * stride).sum::<usize>();
            (fits && offset > 0).then(|| (offset, used, columns[*c].samples, *c))
        })
        .collect();
    let mut best = vec![0u64; total];
    // Which column was added last; the number of columns: none, devices lie idle along a pool.
    let mut taken = vec![u16::MAX; total];
    let mut digits = vec![0usize; sizes.len()];
    for state in 0..total {
        let mut value = 0;
        let mut by = u16::MAX;
        for (pool, stride) in strides.iter().enumerate() {
            if digits[pool] > 0 && best[state - stride] > value {
                value = best[state - stride];
                by = u16::MAX - 1 - pool as u16;
            }
        }
        for (index, (offset, used, samples, _)) in usable.iter().enumerate() {
            if used.iter().zip(&digits).all(|(u, n)| u <= n) {
                let with = best[state - offset] + samples;
                if with > value {
                    value = with;
                    by = index as u16;
                }
            }
        }
        best[state] = value;
        taken[state] = by;
        for (digit, size) in digits.iter_mut().zip(&sizes) {
            *digit += 1;
            if *digit < *size {
                break;
            }
            *digit = 0;
        }
    }
    let mut counts: Vec<(usize, u32)> = Vec::new();
    let mut state = total - 1;
    while taken[state] != u16::MAX {
        let by = usize::from(taken[state]);
        if let Some((offset, _, _, column)) = usable.get(by) {
            match counts.iter_mut().find(|(c, _)| c == column) {
                Some((_, num)) => *num += 1,
                None => counts.push((*column, 1)),
            }
            state -= offset;
        } else {
            state -= strides[usize::from(u16::MAX - 1) - by];
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(used: &[u32], samples: u64) -> Column {
        Column { used: used.to_vec(), samples }
    }

    #[test]
    fn the_relaxed_programme_prices_devices() {
        let columns = [column(&[1, 0], 3), column(&[0, 1], 1), column(&[2, 2], 10)];
        let solution = relaxed(&columns, &[4, 8]);
        // Two of the mixed one, the rest of the second pool alone.
        assert!((solution.value - 24.0).abs() < 1e-9, "{solution:?}");
        assert!((solution.prices[1] - 1.0).abs() < 1e-9);
        assert!((solution.prices[0] - 4.0).abs() < 1e-9);
    }

    #[test]
    fn whole_numbers_use_what_rounding_leaves() {
        let columns = [column(&[3, 0], 7), column(&[2, 0], 4), column(&[0, 2], 3)];
        let limits = [8, 5];
        let mut meter = Meter::endless();
        let counts = whole(&columns, &limits, &relaxed(&columns, &limits), &mut meter).unwrap();
        assert_eq!(counts, [2, 1, 2]);
    }
}
