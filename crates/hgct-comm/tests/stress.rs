//! Random shapes and much of it at once.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

mod common;

use common::{KINDS, Setup, each, mesh, soon, user};
use hgct_comm::{Tag, TagKind};
use hgct_core::ids::Rank;
use proptest::prelude::*;

/// The byte at a place of a message: no two messages alike.
fn byte(from: Rank, tag: Tag, at: usize) -> u8 {
    let word = u64::from(from.0 + 1) * 31 + u64::from(tag.a) * 7 + tag.step * 13 + at as u64;
    (word ^ (word >> 8)) as u8
}

fn message(from: Rank, tag: Tag, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| byte(from, tag, at)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_sizes_arrive_in_any_order(
        ranks in 2u32..5,
        messages in prop::collection::vec((0usize..5, 0usize..150_000), 1..20)
            .prop_flat_map(|sent| (Just(sent.clone()), Just((0..sent.len()).collect::<Vec<_>>()).prop_shuffle())),
        ring_kib in prop::sample::select(vec![4usize, 16, 1024]),
    ) {
        let (sent, order) = messages;
        // Many small sizes among the large.
        let sizes: Vec<usize> = sent.iter().map(|&(shift, bytes)| bytes >> (shift * 4)).collect();
        for kind in KINDS {
            let mut setup = Setup::new(kind);
            setup.tuning.ring_bytes = ring_kib << 10;
            let members = mesh(ranks, setup);
            let right = each(&members, |me| {
                let others = me.ranks().iter().copied().filter(|&rank| rank != me.rank());
                for peer in others.clone() {
                    for (i, &bytes) in sizes.iter().enumerate() {
                        let tag = Tag::new(TagKind::Gradient, i as u32, 0, 1);
                        me.send(peer, tag, message(me.rank(), tag, bytes), soon()).unwrap();
                    }
                }
                others.clone().all(|peer| order.iter().all(|&i| {
                    let tag = Tag::new(TagKind::Gradient, i as u32, 0, 1);
                    let received = me.recv(peer, tag, soon()).unwrap();
                    received[..] == message(peer, tag, sizes[i])[..]
                }))
            });
            prop_assert!(right.into_iter().all(|right| right));
        }
    }
}

#[test]
fn four_ranks_exchange_thirty_megabytes_each_way() {
    const MESSAGES: u32 = 15;
    const BYTES: usize = 2_000_000;
    for kind in KINDS {
        let members = mesh(4, Setup::new(kind));
        each(&members, |me| {
            let others: Vec<_> = me.ranks().iter().filter(|&&rank| rank != me.rank()).collect();
            for i in 0..MESSAGES {
                for &&peer in &others {
                    me.send(peer, user(i, 0), vec![(me.rank().0 * 16 + i) as u8; BYTES], soon()).unwrap();
                }
                me.barrier(u64::from(i), soon()).unwrap();
            }
            for &&peer in &others {
                for i in (0..MESSAGES).rev() {
                    let received = me.recv(peer, user(i, 0), soon()).unwrap();
                    assert_eq!(received.len(), BYTES);
                    assert!(received.iter().all(|&byte| byte == (peer.0 * 16 + i) as u8));
                }
            }
            let total = u64::from(MESSAGES) * BYTES as u64;
            for statistics in me.statistics().values() {
                assert_eq!((statistics.bytes_sent, statistics.bytes_received), (total, total));
            }
        });
    }
}

/// Every rank sends all that it has before it reads anything, as owners of a large model's slices do:
/// more than queues and mailboxes are meant to hold, in both directions and round a circle.
#[test]
fn ranks_that_send_before_they_read_never_wait_for_each_other() {
    const MESSAGES: u32 = 24;
    const BYTES: usize = 1 << 20;
    for (kind, ranks) in KINDS.into_iter().flat_map(|kind| [(kind, 2), (kind, 3)]) {
        let mut setup = Setup::new(kind);
        setup.tuning.queue_bytes = 4 << 20;
        setup.tuning.unread_bytes = 4 << 20;
        let members = mesh(ranks, setup);
        each(&members, |me| {
            let others: Vec<Rank> = me.ranks().iter().copied().filter(|&rank| rank != me.rank()).collect();
            // Not in the same order everywhere: each begins with the rank after its own.
            let (before, after): (Vec<Rank>, Vec<Rank>) = others.iter().partition(|&&rank| rank < me.rank());
            let order = [after, before].concat();
            for &peer in &order {
                for i in 0..MESSAGES {
                    me.send(peer, user(i, 0), vec![(me.rank().0 * 32 + i) as u8; BYTES], soon()).unwrap();
                }
            }
            for &peer in order.iter().rev() {
                for i in 0..MESSAGES {
                    let received = me.recv(peer, user(i, 0), soon()).unwrap();
                    assert_eq!((received.len(), received[BYTES - 1]), (BYTES, (peer.0 * 32 + i) as u8));
                }
            }
        });
    }
}
