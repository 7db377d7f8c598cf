//! Updates for which the driver has no room yet.

use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, TrySendError};

use hgct_control::coordinator::Update;

/// Pieces of checkpoints, at most 1 MiB each, that may wait here beside those in the channel. Other
/// updates are small, and a driver that sends a long file takes none of them meanwhile.
const MOST: usize = 8;

/// In order, without those that a later one replaces.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    waiting: VecDeque<Update>,
}

/// Nobody listens any more.
#[derive(Debug)]
pub(super) struct Gone;

impl Outgoing {
    /// Adds an update. Signs of life do not wait: others come.
    pub(super) fn push(&mut self, update: Update) {
        let passes = matches!(update, Update::AgentAlive { .. } | Update::WorkerAlive { .. });
        if !passes || self.waiting.is_empty() {
            self.waiting.push_back(update);
        }
    }

    /// Hands over what there is room for, without waiting.
    pub(super) fn hand_over(&mut self, updates: &SyncSender<Update>) -> Result<(), Gone> {
        while let Some(update) = self.waiting.pop_front() {
            match updates.try_send(update) {
                Ok(()) => {}
                Err(TrySendError::Full(update)) => {
                    self.waiting.push_front(update);
                    return Ok(());
                }
                Err(TrySendError::Disconnected(_)) => {
                    self.waiting.clear();
                    return Err(Gone);
                }
            }
        }
        Ok(())
    }

    /// Hands over the rest; waits for room.
    pub(super) fn hand_over_all(self, updates: &SyncSender<Update>) {
        for update in self.waiting {
            if updates.send(update).is_err() {
                return;
            }
        }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether so much waits that no more frames should be taken.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.iter().filter(|update| matches!(update, Update::ShardChunk { .. })).count() >= MOST
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use hgct_core::ids::{NodeId, Rank};

    use super::*;

    fn alive() -> Update {
        Update::AgentAlive { node: NodeId::new("n").unwrap(), memory_bytes: 1 }
    }

    #[test]
    fn a_driver_that_does_not_listen_holds_up_nobody_and_misses_nothing_but_signs_of_life() {
        let (sender, receiver) = sync_channel(2);
        let mut outgoing = Outgoing::default();
        for step in 0..3 {
            outgoing.push(Update::StepSkipped { step, in_a_row: 1 });
            outgoing.push(alive());
            outgoing.hand_over(&sender).unwrap();
        }
        for _ in 0..1000 {
            outgoing.push(alive());
            outgoing.hand_over(&sender).unwrap();
        }
        assert!(!outgoing.is_full(), "signs of life pile up");
        let mut steps = Vec::new();
        while let Ok(update) = receiver.try_recv() {
            if let Update::StepSkipped { step, .. } = update {
                steps.push(step);
            }
            outgoing.hand_over(&sender).unwrap();
        }
        assert_eq!(steps, [0, 1, 2]);
    }

    #[test]
    fn only_pieces_of_checkpoints_fill_it() {
        let mut outgoing = Outgoing::default();
        for _ in 0..100 {
            outgoing.push(Update::Running);
        }
        assert!(!outgoing.is_full());
        for offset in 0..8 {
            let (rank, step, num_updates) = (Rank(0), 1, 1);
            outgoing.push(Update::ShardChunk {
                rank,
                step,
                num_updates,
                offset,
                end: None,
                bytes: Vec::new(),
            });
        }
        assert!(outgoing.is_full());
    }

    #[test]
    fn a_driver_that_has_left_is_noticed() {
        let (sender, receiver) = sync_channel(1);
        drop(receiver);
        let mut outgoing = Outgoing::default();
        outgoing.push(Update::Running);
        assert!(outgoing.hand_over(&sender).is_err());
        assert!(outgoing.is_empty());
    }
}
