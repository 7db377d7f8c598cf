//! Collectives, as thin compositions of sends and receives.
//!
//! Which rank sends what to whom stands in [`hgct_collective`], so that the simulator prices the very
//! program that runs here.

use hgct_collective::{Program, all_reduce_scalars};
use hgct_core::ids::Rank;

use crate::buffer::{SendBuffer, f32_bytes_mut};
use crate::communicator::Communicator;
use crate::error::{Context, Error, Operation, Result};
use crate::message::Received;
use crate::tag::{Tag, TagKind};
use crate::time::Deadline;

/// How scalars are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ScalarOp {
    /// Sum in f64 by a fixed tree over the ranks in order.
    Sum,
    /// Largest value; not a number where any is not.
    Max,
    /// 1 where any value is neither zero nor not a number, else 0.
    Or,
}

impl ScalarOp {
    fn code(self) -> u64 {
        self as u64
    }

    /// Combines one value of each rank, given in rank order.
    fn combine(self, values: &[f64]) -> f64 {
        let result = match self {
            Self::Sum => tree_sum(values),
            Self::Max => values.iter().copied().fold(f64::NEG_INFINITY, |largest, value| {
                if largest.is_nan() || value.is_nan() { f64::NAN } else { largest.max(value) }
            }),
            Self::Or => f64::from(values.iter().any(|&value| value != 0.0 && !value.is_nan())),
        };
        // Processors differ in the bits of their not-a-number; zero has one sign.
        if result.is_nan() { f64::NAN } else { result + 0.0 }
    }
}

/// Sum by halves: the same additions in the same order on every rank.
fn tree_sum(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(values.len().div_ceil(2));
            tree_sum(left) + tree_sum(right)
        }
    }
}

impl Communicator {
    /// Combines `values` element by element over all ranks; every rank ends with the same bits. All
    /// ranks call it with the same operation, length and `sequence`, which must not repeat.
    ///
    /// Cost: see [`hgct_collective::all_reduce_scalars`].
    pub fn all_reduce_scalars(
        &self,
        op: ScalarOp,
        values: &mut [f64],
        sequence: u64,
        deadline: Deadline,
    ) -> Result<()> {
        let mut message = op.code().to_le_bytes().to_vec();
        message.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let tag = Tag::new(TagKind::Scalar, 0, 0, sequence);
        let payloads = self.exchange(Operation::AllReduce, tag, message.clone(), deadline)?;
        let mut columns = vec![Vec::with_capacity(self.size()); values.len()];
        for &rank in self.ranks() {
            let theirs = payloads.iter().find(|payload| payload.peer() == rank);
            let bytes: &[u8] = theirs.map_or(&message, |payload| payload);
            if bytes.len() != message.len() || bytes[..8] != message[..8] {
                return Err(self.mismatch(Operation::AllReduce, rank, tag, bytes, &message));
            }
            for (column, word) in columns.iter_mut().zip(bytes[8..].chunks_exact(8)) {
                let mut value = [0; 8];
                value.copy_from_slice(word);
                column.push(f64::from_le_bytes(value));
            }
        }
        for (value, column) in values.iter_mut().zip(columns) {
            *value = op.combine(&column);
        }
        Ok(())
    }

    /// Returns once every rank has called it with this `sequence`, which must not repeat.
    pub fn barrier(&self, sequence: u64, deadline: Deadline) -> Result<()> {
        let tag = Tag::new(TagKind::Barrier, 0, 0, sequence);
        self.exchange(Operation::Barrier, tag, Vec::new(), deadline).map(drop)
    }

    /// Adds the contributions of `order` in that order, in f32, at `owner`, which ends with the sum
    /// in `values`; the others only send theirs. `order` is the order of the pipelines; the owner may
    /// stand anywhere in it, and a rank that is not in it only receives.
    pub fn reduce_to_owner(
        &self,
        owner: Rank,
        order: &[Rank],
        tag: Tag,
        values: &mut [f32],
        deadline: Deadline,
    ) -> Result<()> {
        if self.rank() != owner {
            if order.contains(&self.rank()) {
                self.send(owner, tag, values.to_vec(), deadline)?;
            }
            return Ok(());
        }
        let mine = order.contains(&owner).then(|| values.to_vec());
        for (place, &rank) in order.iter().enumerate() {
            let theirs;
            let contribution = if let (true, Some(mine)) = (rank == owner, &mine) {
                mine.as_slice()
            } else {
                theirs = self.recv_sized(Operation::Reduce, rank, tag, values.len(), deadline)?;
                theirs.as_f32().unwrap_or_default()
            };
            if place == 0 {
                values.copy_from_slice(contribution);
            } else {
                for (sum, value) in values.iter_mut().zip(contribution) {
                    *sum += value;
                }
            }
        }
        Ok(())
    }

    /// Hands the owner's `values` to all `holders`.
    pub fn gather_from_owner(
        &self,
        owner: Rank,
        holders: &[Rank],
        tag: Tag,
        values: &mut [f32],
        deadline: Deadline,
    ) -> Result<()> {
        if self.rank() == owner {
            let copy = SendBuffer::from(values.to_vec());
            for &holder in holders.iter().filter(|&&holder| holder != owner) {
                self.send(holder, tag, copy.clone(), deadline)?;
            }
        } else if holders.contains(&self.rank()) {
            let new = self.recv_sized(Operation::Gather, owner, tag, values.len(), deadline)?;
            f32_bytes_mut(values).copy_from_slice(&new);
        }
        Ok(())
    }

    /// Everyone's message to everyone.
    fn exchange(
        &self,
        operation: Operation,
        tag: Tag,
        message: Vec<u8>,
        deadline: Deadline,
    ) -> Result<Vec<Received>> {
        let program: Program = all_reduce_scalars(self.ranks(), message.len() as u64);
        let message = SendBuffer::from(message);
        let mut received = Vec::with_capacity(self.size());
        for step in program.steps() {
            for transfer in step.iter().filter(|transfer| transfer.from == self.rank()) {
                self.send(transfer.to, tag, message.clone(), deadline)?;
            }
            for transfer in step.iter().filter(|transfer| transfer.to == self.rank()) {
                let context = self.collective_context(operation, transfer.from, tag);
                let wanted = [(transfer.from, tag)];
                received.push(self.recv_as(&wanted, deadline, &context)?.1);
            }
        }
        Ok(received)
    }

    fn recv_sized(
        &self,
        operation: Operation,
        peer: Rank,
        tag: Tag,
        elements: usize,
        deadline: Deadline,
    ) -> Result<Received> {
        let context = self.collective_context(operation, peer, tag);
        let (_, message) = self.recv_as(&[(peer, tag)], deadline, &context)?;
        if message.len() == elements * size_of::<f32>() {
            return Ok(message);
        }
        Err(self.core.fail(Error::Mismatch {
            context: Box::new(context),
            found: format!("{} bytes", message.len()),
            expected: format!("{elements} floats"),
        }))
    }

    fn collective_context(&self, operation: Operation, peer: Rank, tag: Tag) -> Context {
        let context = self.receive_context(operation, peer, Some(tag));
        Context { sequence: Some(tag.step), ..context }
    }

    fn mismatch(&self, operation: Operation, peer: Rank, tag: Tag, found: &[u8], expected: &[u8]) -> Error {
        let words = |bytes: &[u8]| {
            let op = bytes.first().copied().unwrap_or_default();
            format!("operation {op} over {} values", (bytes.len() / 8).saturating_sub(1))
        };
        self.core.fail(Error::Mismatch {
            context: Box::new(self.collective_context(operation, peer, tag)),
            found: words(found),
            expected: words(expected),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_combine_in_a_fixed_order_to_fixed_bits() {
        let bits = |op: ScalarOp, values: &[f64]| op.combine(values).to_bits();
        // (1e16 + 1) + (-1e16 + 1): the tree, not the running sum.
        let tree: f64 = (1e16 + 1.0) + (-1e16 + 1.0);
        assert_eq!(bits(ScalarOp::Sum, &[1e16, 1.0, -1e16, 1.0]), tree.to_bits());
        assert_eq!(bits(ScalarOp::Sum, &[-0.0]), 0);
        assert_eq!(bits(ScalarOp::Max, &[1.0, 3.0, 2.0]), 3f64.to_bits());
        let odd = f64::from_bits(f64::NAN.to_bits() | 5);
        assert_eq!(bits(ScalarOp::Max, &[1.0, odd]), f64::NAN.to_bits());
        assert_eq!(bits(ScalarOp::Sum, &[odd, 1.0]), f64::NAN.to_bits());
        assert_eq!(bits(ScalarOp::Or, &[0.0, -0.0]), 0);
        assert_eq!(bits(ScalarOp::Or, &[0.0, 2.0]), 1f64.to_bits());
    }
}
