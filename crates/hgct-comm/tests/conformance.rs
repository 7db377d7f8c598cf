//! What every transport must do: the same suite over all of them.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

mod common;

use std::time::{Duration, Instant};

use common::{Kind, Setup, each, mesh, soon, user, within_ms};
use hgct_comm::{Deadline, Direction, Error, ScalarOp, SendState, Tag, TagKind};
use hgct_core::ids::Rank;

/// One test a transport for each item of the suite.
macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod tcp {
            $(#[test] fn $name() { super::$name(super::Setup::new(super::Kind::Tcp)); })*
        }
        mod shared_memory {
            $(#[test] fn $name() { super::$name(super::Setup::new(super::Kind::SharedMemory)); })*
        }
    };
}

suite!(
    messages_arrive_whole_under_their_tags,
    tags_may_be_received_in_any_order,
    one_tag_keeps_its_order,
    the_first_of_several_is_found,
    scalars_are_the_same_bits_everywhere,
    owners_reduce_in_order_and_hand_back,
    barriers_hold_everyone,
    a_send_does_not_wait_for_the_receiver,
    transfers_are_recorded,
    links_are_measured,
    leaving_in_order_loses_nothing,
    a_delay_is_not_serialised,
);

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn messages_arrive_whole_under_their_tags(setup: Setup) {
    let members = mesh(3, setup);
    assert_eq!(members[0].transport_to(Rank(1)).unwrap(), setup.kind.name());
    let sizes = [0, 1, 63, 64, 4095, 4096, 65_536, 65_537, 5 << 20];
    each(&members, |me| {
        let others: Vec<_> = me.ranks().iter().filter(|&&rank| rank != me.rank()).collect();
        for (i, &bytes) in sizes.iter().enumerate() {
            for &&peer in &others {
                let tag = user(i as u32, 7);
                me.send(peer, tag, pattern(bytes, me.rank().0 as u8), soon()).unwrap();
            }
        }
        for (i, &bytes) in sizes.iter().enumerate() {
            for &&peer in &others {
                let message = me.recv(peer, user(i as u32, 7), soon()).unwrap();
                assert!(message[..] == pattern(bytes, peer.0 as u8)[..], "{bytes} bytes differ");
                assert_eq!(message.as_ptr() as usize % hgct_comm::ALIGNMENT, 0);
                assert_eq!((message.peer(), message.tag()), (peer, user(i as u32, 7)));
            }
        }
    });
}

fn tags_may_be_received_in_any_order(setup: Setup) {
    let members = mesh(2, setup);
    let kinds = [TagKind::Activation, TagKind::ActivationGradient, TagKind::Gradient];
    let mut tags = Vec::new();
    for kind in kinds {
        for (a, b, step) in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            tags.push(Tag::new(kind, a, b, step));
        }
    }
    for (i, &tag) in tags.iter().enumerate() {
        members[0].send(Rank(1), tag, vec![i as u8], soon()).unwrap();
    }
    for (i, &tag) in tags.iter().enumerate().rev() {
        assert_eq!(members[1].recv(Rank(0), tag, soon()).unwrap()[..], [i as u8]);
    }
}

fn one_tag_keeps_its_order(setup: Setup) {
    let members = mesh(2, setup);
    for i in 0..200u8 {
        // Sizes on both sides of what leaves inline.
        let bytes = if i % 7 == 0 { 100_000 } else { 10 };
        members[0].send(Rank(1), user(0, 0), vec![i; bytes], soon()).unwrap();
    }
    for i in 0..200u8 {
        assert_eq!(members[1].recv(Rank(0), user(0, 0), soon()).unwrap()[0], i);
    }
}

fn the_first_of_several_is_found(setup: Setup) {
    let members = mesh(3, setup);
    let wanted = [(Rank(1), user(1, 0)), (Rank(2), user(2, 0))];
    assert!(members[0].poll_any(&wanted, within_ms(1)).unwrap().is_none());
    assert!(members[0].try_recv(Rank(1), user(1, 0)).unwrap().is_none());
    members[2].send(Rank(0), user(2, 0), vec![2], soon()).unwrap();
    let (index, message) = members[0].recv_any(&wanted, soon()).unwrap();
    assert_eq!((index, message[0]), (1, 2));
    members[1].send(Rank(0), user(1, 0), vec![1], soon()).unwrap();
    let (index, message) = members[0].poll_any(&wanted, soon()).unwrap().unwrap();
    assert_eq!((index, message[0]), (0, 1));
}

fn scalars_are_the_same_bits_everywhere(setup: Setup) {
    let members = mesh(4, setup);
    for sequence in 0..20 {
        let sums = each(&members, |me| {
            let mut values = [1.0 / f64::from(me.rank().0 + 3), 1e17, f64::from(me.rank().0)];
            me.all_reduce_scalars(ScalarOp::Sum, &mut values, sequence * 3, soon()).unwrap();
            let mut largest = [f64::from(me.rank().0)];
            me.all_reduce_scalars(ScalarOp::Max, &mut largest, sequence * 3 + 1, soon()).unwrap();
            let mut any = [f64::from(me.rank() == Rank(2)), 0.0];
            me.all_reduce_scalars(ScalarOp::Or, &mut any, sequence * 3 + 2, soon()).unwrap();
            (values.map(f64::to_bits), largest, any)
        });
        assert!(sums.iter().all(|sum| *sum == sums[0]));
        assert_eq!((sums[0].1, sums[0].2), ([3.0], [1.0, 0.0]));
        let expected = (1.0f64 / 3.0 + 1.0 / 4.0) + (1.0 / 5.0 + 1.0 / 6.0);
        assert_eq!(sums[0].0[0], expected.to_bits());
    }
}

fn owners_reduce_in_order_and_hand_back(setup: Setup) {
    let members = mesh(3, setup);
    let order = [Rank(2), Rank(0), Rank(1)];
    let results = each(&members, |me| {
        // In f32 the order shows: (1e8 + -1e8) + 1 = 1, but 1e8 + (-1e8 + 1) = 0.
        let mut values = [[1.0f32, 2.0], [1e8, 4.0], [-1e8, 8.0]][me.rank().index()];
        let tag = Tag::new(TagKind::Gradient, 0, 3, 9);
        me.reduce_to_owner(Rank(1), &order, tag, &mut values, soon()).unwrap();
        let tag = Tag::new(TagKind::Parameter, 0, 3, 9);
        me.gather_from_owner(Rank(1), me.ranks(), tag, &mut values, soon()).unwrap();
        values
    });
    let expected = (-1e8f32 + 1.0) + 1e8;
    assert_eq!(results, [[expected, 14.0]; 3]);
}

fn barriers_hold_everyone(setup: Setup) {
    let members = mesh(4, setup);
    let came = std::sync::atomic::AtomicU64::new(0);
    each(&members, |me| {
        for sequence in 0..50 {
            came.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            me.barrier(sequence, soon()).unwrap();
            assert!(came.load(std::sync::atomic::Ordering::SeqCst) >= 4 * (sequence + 1));
        }
    });
}

fn a_send_does_not_wait_for_the_receiver(setup: Setup) {
    let members = mesh(2, setup);
    let begun = Instant::now();
    // More than sockets and rings hold; the receiver reads only afterwards.
    let tickets: Vec<_> = (0..24)
        .map(|i| members[0].send(Rank(1), user(i, 0), vec![i as u8; 4 << 20], soon()).unwrap())
        .collect();
    let queued = begun.elapsed();
    for i in (0..24).rev() {
        let message = members[1].recv(Rank(0), user(i, 0), soon()).unwrap();
        assert!(message.iter().all(|&byte| byte == i as u8));
    }
    for ticket in &tickets {
        assert!(matches!(ticket.wait(soon()), SendState::Sent(_)));
    }
    assert!(queued < Duration::from_secs(1), "24 sends took {queued:?}");
}

fn transfers_are_recorded(setup: Setup) {
    let members = mesh(2, setup);
    let ticket = members[0].send(Rank(1), user(5, 6), vec![1u8; 1 << 20], soon()).unwrap();
    members[1].recv(Rank(0), user(5, 6), soon()).unwrap();
    let SendState::Sent(times) = ticket.wait(soon()) else { panic!("not sent") };
    assert!(times.queued_ns <= times.start_ns && times.start_ns <= times.end_ns);
    let (sent, lost) = members[0].drain_transfers();
    assert_eq!((sent.len(), lost), (1, 0));
    assert_eq!((sent[0].direction, sent[0].bytes), (Direction::Send, 1 << 20));
    assert_eq!((sent[0].queued_ns, sent[0].end_ns), (times.queued_ns, times.end_ns));
    let (received, _) = members[1].drain_transfers();
    assert_eq!((received[0].peer, received[0].tag), (Rank(0), user(5, 6)));
    assert_eq!(received[0].queued_ns, times.queued_ns, "one host, one clock");
    assert!(received[0].end_ns > times.start_ns);
    assert!(members[1].drain_transfers().0.is_empty());
    let statistics = members[0].statistics()[&Rank(1)];
    assert_eq!((statistics.bytes_sent, statistics.messages_sent), (1 << 20, 1));
    assert!(statistics.send_pending_ns >= times.end_ns - times.start_ns);
    assert_eq!(members[1].statistics()[&Rank(0)].bytes_received, 1 << 20);
}

fn links_are_measured(setup: Setup) {
    let members = mesh(2, setup);
    let measured = members[0].measure_link(Rank(1), soon()).unwrap();
    assert!(measured.latency_ns > 100 && measured.latency_ns < 100_000_000, "{measured:?}");
    assert!(measured.bytes_per_s > 10_000_000, "{measured:?}");
    assert!(members[0].drain_transfers().0.is_empty(), "probes are no transfers");
    assert_eq!(members[1].statistics()[&Rank(0)], hgct_comm::PeerStatistics::default());
}

fn leaving_in_order_loses_nothing(setup: Setup) {
    let mut members = mesh(3, setup);
    let last = members.pop();
    last.send(Rank(0), user(0, 0), pattern(3 << 20, 1), soon()).unwrap();
    // Nobody else leaves, so it goes at its deadline, with everything sent.
    assert!(last.close(within_ms(50)));
    drop(last);
    assert!(members[0].recv(Rank(2), user(0, 0), soon()).unwrap()[..] == pattern(3 << 20, 1)[..]);
    members[0].send(Rank(1), user(1, 0), vec![9], soon()).unwrap();
    assert_eq!(members[1].recv(Rank(0), user(1, 0), soon()).unwrap()[..], [9]);
    let begun = Instant::now();
    let error = members[1].poll_any(&[(Rank(2), user(0, 0))], soon()).unwrap_err();
    assert!(matches!(error, Error::PeerLeft { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(each(&members, |me| me.close(soon())), [true, true]);
}

fn a_delay_is_not_serialised(mut setup: Setup) {
    setup.delay_ns = 50_000_000;
    let members = mesh(2, setup);
    let begun = Instant::now();
    for i in 0..20 {
        members[0].send(Rank(1), user(i, 0), vec![0u8; 100], soon()).unwrap();
    }
    for i in 0..20 {
        members[1].recv(Rank(0), user(i, 0), soon()).unwrap();
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(50), "{took:?}: the delay is missing");
    assert!(took < Duration::from_millis(500), "{took:?}: the delays add up");
    let (records, _) = members[1].drain_transfers();
    assert!(records.iter().all(|record| record.end_ns - record.start_ns >= 50_000_000));
}

#[test]
fn bad_calls_are_typed_errors_that_break_nothing() {
    let members = mesh(2, Setup::new(Kind::Tcp));
    let stranger = members[0].send(Rank(7), user(0, 0), vec![0u8], soon()).unwrap_err();
    assert!(matches!(stranger, Error::NotAMember { .. }), "{stranger}");
    let myself = members[0].recv(Rank(0), user(0, 0), soon()).unwrap_err();
    assert!(matches!(myself, Error::NotAMember { .. }), "{myself}");
    let device = hgct_core::dtype::MemoryKind::Device("nvidia".into());
    let memory = members[0].register(Rank(1), vec![0u8], device).unwrap_err();
    assert!(memory.to_string().contains("tcp cannot take"), "{memory}");
    let too_large = std::sync::Arc::new(vec![0u8; (1 << 30) + 1]);
    let error = members[0].send(Rank(1), user(0, 0), too_large, soon()).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    members[0].send(Rank(1), user(0, 0), vec![1], Deadline::at_ns(0)).unwrap();
    assert_eq!(members[1].recv(Rank(0), user(0, 0), soon()).unwrap()[..], [1]);
}
