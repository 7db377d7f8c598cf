//! Whether any number of micro-batches gives the global batch.

use crate::instance::Instance;
use crate::wide::gcd;
use crate::{Error, Result};

/// Every pipeline takes whole micro-batches of one of the known sizes, so the global batch must be a
/// sum of such sizes; an error names the nearest that are.
pub fn check_batch(instance: &Instance) -> Result<()> {
    let mut sizes: Vec<u32> =
        instance.pools.iter().flat_map(|pool| &pool.costs).map(|cost| cost.micro_batch).collect();
    sizes.sort_unstable();
    sizes.dedup();
    if instance.global_batch > 0 && reachable(instance.global_batch, &sizes) {
        return Ok(());
    }
    let batch = instance.global_batch;
    let most = sizes.last().copied().unwrap_or(1);
    let below = (batch.saturating_sub(4 * most).max(1)..batch).rev().find(|n| reachable(*n, &sizes));
    let above = (batch + 1..=batch.saturating_add(4 * most)).find(|n| reachable(*n, &sizes));
    let nearest: Vec<String> = below.into_iter().chain(above).map(|n| n.to_string()).collect();
    Err(Error::GlobalBatch { global_batch: batch, sizes, nearest: nearest.join(", ") })
}

/// Whether `batch` is a sum of `sizes`, ascending.
fn reachable(batch: u32, sizes: &[u32]) -> bool {
    let Some(&first) = sizes.first() else { return false };
    // Beyond the square of the largest size only the common divisor counts (Schur).
    let divisor = sizes.iter().fold(0, |a, b| gcd(a, *b));
    if !batch.is_multiple_of(divisor) {
        return false;
    }
    if first == divisor
        || sizes.last().is_some_and(|most| u64::from(batch) >= u64::from(*most) * u64::from(*most))
    {
        return batch >= first;
    }
    let mut sums = vec![false; batch as usize + 1];
    sums[0] = true;
    for at in 1..=batch as usize {
        sums[at] = sizes.iter().any(|size| at >= *size as usize && sums[at - *size as usize]);
    }
    sums[batch as usize]
}
