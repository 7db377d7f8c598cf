//! Where a rank's time went: every nanosecond of a step in exactly one share.

use hgct_core::schedule::Operation;
use hgct_core::timeline::{ActionSpan, RankTimeline};
use serde::{Deserialize, Serialize};

/// Parts of one rank's step, nanoseconds; they sum to the window that was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shares {
    /// In forward and backward.
    pub(crate) compute_ns: u64,
    /// In reduce, update and gather, but for what of them is waiting.
    pub(crate) exchange_ns: u64,
    /// Communication that nothing hides, outside of the exchange: in a send, or in a wait or gap
    /// while a transfer of this rank was pending.
    pub(crate) exposed_ns: u64,
    /// For others: in a receive before anything came, in reduce, update and gather while nothing
    /// was under way and something was yet to come, before the rank's first action of the step or
    /// after its last.
    pub(crate) waiting_ns: u64,
    /// In gaps between actions with no transfer pending.
    pub(crate) unexplained_ns: u64,
}

impl Shares {
    /// All of them: the window's length.
    pub(crate) fn total_ns(&self) -> u64 {
        self.compute_ns + self.exchange_ns + self.exposed_ns + self.waiting_ns + self.unexplained_ns
    }

    /// Splits the window `[begin_ns, end_ns)` of a rank; spans may overlap and reach beyond it.
    pub(crate) fn of(rank: &RankTimeline, begin_ns: u64, end_ns: u64) -> Self {
        let mut changes = Vec::with_capacity(2 * (rank.actions.len() + rank.transfers.len()));
        let mut add = |doing: Doing, start: u64, end: u64| {
            let (start, end) = (start.max(begin_ns), end.min(end_ns));
            if start < end {
                changes.push((start, doing, 1i64));
                changes.push((end, doing, -1));
            }
        };
        for span in &rank.actions {
            let doing = Doing::of(span.action.operation);
            add(doing, span.start_ns, span.end_ns);
            if matches!(doing, Doing::Exchange) {
                add(Doing::Await, span.start_ns, awaited_until(rank, span));
            }
        }
        for span in &rank.transfers {
            add(Doing::Transfer, span.start_ns, span.end_ns);
        }
        let first = rank.actions.iter().map(|span| span.start_ns).min().unwrap_or(end_ns);
        let last = rank.actions.iter().map(|span| span.end_ns).max().unwrap_or(end_ns);
        add(Doing::Outside, begin_ns, first);
        add(Doing::Outside, last, end_ns);
        changes.sort_unstable_by_key(|(at, ..)| *at);

        let mut shares = Self::default();
        let mut active = [0i64; Doing::COUNT];
        let mut at = begin_ns;
        for (next, doing, change) in changes {
            *shares.part(&active) += next - at;
            at = next;
            active[doing as usize] += change;
        }
        *shares.part(&active) += end_ns.saturating_sub(at);
        shares
    }

    /// The share that time with these doings belongs to.
    fn part(&mut self, active: &[i64; Doing::COUNT]) -> &mut u64 {
        let is = |doing: Doing| active[doing as usize] > 0;
        if is(Doing::Compute) {
            &mut self.compute_ns
        } else if is(Doing::Exchange) {
            if is(Doing::Await) && !is(Doing::Transfer) {
                &mut self.waiting_ns
            } else {
                &mut self.exchange_ns
            }
        } else if is(Doing::Transfer) || is(Doing::Send) {
            &mut self.exposed_ns
        } else if is(Doing::Receive) || is(Doing::Outside) {
            &mut self.waiting_ns
        } else {
            &mut self.unexplained_ns
        }
    }
}

/// Until when an action of the exchange had something to wait for: the last of what it took in
/// began to come then. Its start where it took in nothing.
pub(super) fn awaited_until(rank: &RankTimeline, span: &ActionSpan) -> u64 {
    let incoming = rank.transfers.iter().filter(|transfer| !transfer.outgoing);
    let inside = incoming.map(|t| t.start_ns).filter(|at| (span.start_ns..span.end_ns).contains(at));
    inside.max().unwrap_or(span.start_ns)
}

/// What a rank can be at.
#[derive(Debug, Clone, Copy)]
enum Doing {
    Compute,
    Exchange,
    Await,
    Send,
    Receive,
    Transfer,
    Outside,
}

impl Doing {
    const COUNT: usize = 7;

    fn of(operation: Operation) -> Self {
        match operation {
            Operation::Reduce | Operation::Update | Operation::Gather => Self::Exchange,
            Operation::SendActivation | Operation::SendGradient => Self::Send,
            Operation::RecvActivation | Operation::RecvGradient => Self::Receive,
            _ => Self::Compute,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hgct_core::ids::{DeviceId, Rank};
    use hgct_core::timeline::TransferSpan;
    use proptest::prelude::*;

    fn rank(actions: &[(&str, u64, u64)], transfers: &[(u64, u64)]) -> RankTimeline {
        RankTimeline {
            rank: Rank(0),
            device: DeviceId::new("local/torch:0").unwrap(),
            clock_offset_ns: 0,
            clock_uncertainty_ns: 0,
            actions: actions
                .iter()
                .map(|(action, start_ns, end_ns)| ActionSpan {
                    step: 0,
                    action: action.parse().unwrap(),
                    start_ns: *start_ns,
                    end_ns: *end_ns,
                })
                .collect(),
            transfers: transfers
                .iter()
                .map(|(start_ns, end_ns)| TransferSpan {
                    step: 0,
                    peer: Rank(1),
                    outgoing: true,
                    size_bytes: 1,
                    start_ns: *start_ns,
                    end_ns: *end_ns,
                })
                .collect(),
        }
    }

    #[test]
    fn a_step_splits_as_a_person_would_split_it() {
        let rank = rank(
            &[
                ("0RECV_F0", 10, 30),
                ("0F0", 30, 60),
                ("0SEND_F0", 60, 62),
                ("0B0", 65, 80),
                ("0REDUCE", 80, 84),
                ("0GATHER", 84, 90),
            ],
            // Half of the receive has bytes under way, and compute hides the other.
            &[(20, 30), (40, 50), (82, 83)],
        );
        let shares = Shares::of(&rank, 0, 100);
        let expected = Shares {
            compute_ns: 45,
            exchange_ns: 10,
            exposed_ns: 12,
            waiting_ns: 10 + 10 + 10,
            unexplained_ns: 3,
        };
        assert_eq!(shares, expected);
    }

    #[test]
    fn an_exchange_waits_until_the_last_of_what_it_takes_in_begins_to_come() {
        let mut rank =
            rank(&[("0UPDATE", 0, 50), ("0GATHER", 50, 70)], &[(5, 10), (30, 34), (40, 44), (50, 55)]);
        for incoming in [0, 1, 3] {
            rank.transfers[incoming].outgoing = false;
        }
        // The update works while a transfer is under way and from the last incoming one on.
        let expected = Shares { waiting_ns: 5 + 20, exchange_ns: 5 + 20 + 20, ..Shares::default() };
        assert_eq!(Shares::of(&rank, 0, 70), expected);
    }

    #[test]
    fn a_rank_without_actions_waits_all_the_time() {
        assert_eq!(Shares::of(&rank(&[], &[]), 5, 105), Shares { waiting_ns: 100, ..Shares::default() });
    }

    proptest! {
        #[test]
        fn shares_sum_to_the_window_and_compute_and_exposed_agree_with_the_timeline(
            lengths in prop::collection::vec((0u64..50, 0u64..50, 0usize..6), 1..20),
            transfers in prop::collection::vec((0u64..1000, 0u64..200), 0..12),
            window in (0u64..500, 0u64..2000),
        ) {
            let names = ["0F0", "0B0", "0SEND_F0", "0RECV_B0", "0UPDATE", "0GATHER"];
            let mut at = 0;
            let actions: Vec<(&str, u64, u64)> = lengths
                .iter()
                .map(|(gap, length, name)| {
                    let start = at + gap;
                    at = start + length;
                    (names[*name], start, at)
                })
                .collect();
            let transfers: Vec<(u64, u64)> = transfers.iter().map(|(s, l)| (*s, s + l)).collect();
            let rank = rank(&actions, &transfers);
            let (begin, end) = (window.0, window.0 + window.1);
            prop_assert_eq!(Shares::of(&rank, begin, end).total_ns(), end - begin);
            let first = actions[0].1;
            let whole = Shares::of(&rank, first, at);
            prop_assert_eq!(whole.total_ns(), at - first);
            prop_assert_eq!(whole.compute_ns, rank.compute_ns());
            let no_exchange = actions.iter().all(|(name, ..)| !name.contains('T'));
            let no_send = actions.iter().all(|(name, ..)| !name.contains("SEND"));
            if no_exchange && no_send {
                prop_assert_eq!(whole.exposed_ns, rank.exposed_communication_ns());
            }
        }
    }
}
