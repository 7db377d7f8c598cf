//! Collective programs as data: who sends which bytes to whom, in how many steps.
//!
//! A [`Program`] is executed by `hgct-comm` and priced by the planner's simulator, so that what is
//! predicted is what runs. Each generator states its cost; [`Program::cost`] counts it.
//!
//! *Absent here*: islands of unequal rates and pipelining by chunk, for which [`Transfer`] already
//! names byte ranges.

use std::collections::BTreeMap;
use std::ops::Range;

use hgct_core::ids::Rank;

/// What the target does with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Combine {
    /// Takes them as they are.
    Copy,
    /// Adds them to its own, contributions in the order of the transfers.
    Add,
    /// Keeps them beside the others' and combines all by a fixed tree in rank order.
    Tree,
}

/// Bytes from one rank to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The source.
    pub from: Rank,
    /// The target.
    pub to: Rank,
    /// Which bytes of the message.
    pub range: Range<u64>,
    /// What the target does with them.
    pub combine: Combine,
}

/// The steps of a collective. Transfers of one step need nothing from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Program {
    steps: Vec<Vec<Transfer>>,
}

/// What a program costs, for alpha and beta of a link: no rank is done before
/// `steps · alpha + max(sent, received) · beta`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Steps one after another.
    pub steps: u64,
    /// Messages in all.
    pub messages: u64,
    /// Bytes in all.
    pub bytes: u64,
    /// Largest number of bytes that one rank sends.
    pub max_bytes_sent: u64,
    /// Largest number of bytes that one rank receives.
    pub max_bytes_received: u64,
}

impl Program {
    /// The steps in order.
    pub fn steps(&self) -> &[Vec<Transfer>] {
        &self.steps
    }

    /// Counts steps and bytes.
    pub fn cost(&self) -> Cost {
        let mut cost = Cost { steps: self.steps.len() as u64, ..Cost::default() };
        let mut sent = BTreeMap::<Rank, u64>::new();
        let mut received = BTreeMap::<Rank, u64>::new();
        for transfer in self.steps.iter().flatten() {
            let bytes = transfer.range.end - transfer.range.start;
            cost.messages += 1;
            cost.bytes += bytes;
            *sent.entry(transfer.from).or_default() += bytes;
            *received.entry(transfer.to).or_default() += bytes;
        }
        cost.max_bytes_sent = sent.into_values().max().unwrap_or(0);
        cost.max_bytes_received = received.into_values().max().unwrap_or(0);
        cost
    }

    fn one_step(transfers: Vec<Transfer>) -> Self {
        Self { steps: if transfers.is_empty() { Vec::new() } else { vec![transfers] } }
    }
}

/// Contributions of `order` to `owner`, which adds them in that order; its own needs no transfer.
///
/// Cost with n contributors other than the owner: 1 step; the owner receives n · `bytes`.
pub fn reduce_to_owner(owner: Rank, order: &[Rank], bytes: u64) -> Program {
    let others = order.iter().filter(|&&rank| rank != owner);
    let transfer = |&from: &Rank| Transfer { from, to: owner, range: 0..bytes, combine: Combine::Add };
    Program::one_step(others.map(transfer).collect())
}

/// What `owner` has, to all `holders`.
///
/// Cost with n holders other than the owner: 1 step; the owner sends n · `bytes`.
pub fn gather_from_owner(owner: Rank, holders: &[Rank], bytes: u64) -> Program {
    let others = holders.iter().filter(|&&rank| rank != owner);
    let transfer = |&to: &Rank| Transfer { from: owner, to, range: 0..bytes, combine: Combine::Copy };
    Program::one_step(others.map(transfer).collect())
}

/// A few scalars of every rank to every rank, combined by each in rank order to the same bits.
///
/// Everyone to everyone takes one latency and waits for no third rank to be scheduled, which for a
/// few bytes is worth more than fewer messages. Cost with n ranks: 1 step, n(n−1) messages; each rank
/// sends and receives (n−1) · `bytes`.
pub fn all_reduce_scalars(ranks: &[Rank], bytes: u64) -> Program {
    let mut transfers = Vec::with_capacity(ranks.len() * ranks.len());
    for &from in ranks {
        for &to in ranks.iter().filter(|&&to| to != from) {
            transfers.push(Transfer { from, to, range: 0..bytes, combine: Combine::Tree });
        }
    }
    Program::one_step(transfers)
}

/// Nobody leaves before everybody has come.
///
/// Cost with n ranks: 1 step, n(n−1) messages without bytes.
pub fn barrier(ranks: &[Rank]) -> Program {
    all_reduce_scalars(ranks, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(count: u32) -> Vec<Rank> {
        (0..count).map(Rank).collect()
    }

    #[test]
    fn costs_are_those_stated() {
        let cost = reduce_to_owner(Rank(1), &ranks(4), 100).cost();
        assert_eq!((cost.steps, cost.messages, cost.max_bytes_received), (1, 3, 300));
        assert_eq!(cost.max_bytes_sent, 100);
        let cost = gather_from_owner(Rank(1), &ranks(4), 100).cost();
        assert_eq!((cost.steps, cost.max_bytes_sent, cost.max_bytes_received), (1, 300, 100));
        for n in 1..6 {
            let cost = all_reduce_scalars(&ranks(n as u32), 24).cost();
            assert_eq!(cost.steps, u64::from(n > 1));
            assert_eq!(cost.messages, n * (n - 1));
            assert_eq!((cost.max_bytes_sent, cost.max_bytes_received), ((n - 1) * 24, (n - 1) * 24));
            assert_eq!(barrier(&ranks(n as u32)).cost().bytes, 0);
        }
    }

    #[test]
    fn an_owner_alone_sends_nothing() {
        assert_eq!(reduce_to_owner(Rank(2), &[Rank(2)], 8), Program::default());
        assert_eq!(gather_from_owner(Rank(2), &[], 8).cost(), Cost::default());
    }

    #[test]
    fn contributions_keep_the_order_of_the_pipelines() {
        let order = [Rank(3), Rank(0), Rank(2)];
        let program = reduce_to_owner(Rank(0), &order, 8);
        let from: Vec<_> = program.steps()[0].iter().map(|transfer| transfer.from).collect();
        assert_eq!(from, [Rank(3), Rank(2)]);
    }
}
