//! Inputs and labels of a micro-batch.

use hgct_core::dtype::DType;
use hgct_data::token_file::Samples;

use crate::Result;
use crate::engine::Lease;

/// `input_ids` and `labels`, each `[b, s]`, of the given samples.
pub(super) fn micro_batch(samples: &Samples<'_>, ids: &[u64]) -> Result<(Lease, Lease)> {
    let capacity = ids.len() * samples.seq_len() as usize;
    let (mut inputs, mut labels) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
    for id in ids {
        samples.append(*id, &mut inputs, &mut labels)?;
    }
    let shape = vec![ids.len() as u64, u64::from(samples.seq_len())];
    Ok((token_lease("input_ids", shape.clone(), &inputs), token_lease("labels", shape, &labels)))
}

/// Tokens as the i32 that engines take.
pub(super) fn token_lease(name: &str, shape: Vec<u64>, tokens: &[u32]) -> Lease {
    debug_assert_eq!(shape.iter().product::<u64>(), tokens.len() as u64, "{name} {shape:?} {}", DType::I32);
    Lease::of_i32(name, shape, tokens.iter().map(|token| *token as i32).collect())
}
