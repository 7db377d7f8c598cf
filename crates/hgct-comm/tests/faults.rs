//! Deadlines, deaths and aborts: every wait ends, at once or at its deadline, and says why.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

mod common;

use std::env;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{KINDS, Kind, Setup, each, listener, mesh, options, soon, user, within_ms};
use hgct_comm::{Communicator, Deadline, Endpoint, Error, Peer, ScalarOp, SendBuffer, SendState};
use hgct_core::ids::Rank;

#[test]
fn a_passed_deadline_names_everything_and_breaks_the_communicator() {
    for kind in KINDS {
        let members = mesh(3, Setup::new(kind));
        let begun = Instant::now();
        let error = members[0].recv(Rank(2), user(4, 5), within_ms(60)).unwrap_err();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(60) && took < Duration::from_secs(5), "{took:?}");
        let text = error.to_string();
        for part in ["rank 0", "rank 2", "receive", "user 4.0 of step 5", "generation 1.4", " ms"] {
            assert!(text.contains(part), "{part:?} is missing in {text:?}");
        }
        let again = members[0].send(Rank(1), user(0, 0), vec![1], soon()).unwrap_err();
        assert!(matches!(again, Error::Broken { .. }), "{again}");
        assert!(matches!(again.root(), Error::Deadline { .. }));
        assert_eq!(again.culprit(), Some(Rank(2)));
        assert!(members[0].try_recv(Rank(1), user(0, 0)).is_err());
        members[1].send(Rank(2), user(0, 0), vec![1], soon()).unwrap();
        assert_eq!(members[2].recv(Rank(1), user(0, 0), soon()).unwrap()[..], [1], "others go on");
    }
}

#[test]
fn a_collective_names_the_rank_that_did_not_come() {
    let members = mesh(3, Setup::new(Kind::Tcp));
    let errors = each(&members[..2], |me| me.barrier(8, within_ms(80)).unwrap_err());
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("barrier with rank 2") && text.contains("sequence 8"), "{text}");
    }
    let members = mesh(2, Setup::new(Kind::Tcp));
    let errors = each(&members, |me| {
        let mut values = vec![0.0; 1 + me.rank().index()];
        me.all_reduce_scalars(ScalarOp::Sum, &mut values, 0, soon()).unwrap_err()
    });
    assert!(matches!(errors[0], Error::Mismatch { .. }), "{}", errors[0]);
}

#[test]
fn a_full_queue_is_an_error_at_its_deadline() {
    for kind in KINDS {
        let mut setup = Setup::new(kind);
        setup.tuning.queue_bytes = 4 << 20;
        setup.tuning.unread_bytes = 1 << 20;
        let members = mesh(2, setup);
        let payload = SendBuffer::from(vec![0u8; 1 << 20]);
        let error = loop {
            match members[0].send(Rank(1), user(0, 0), payload.clone(), within_ms(50)) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::QueueFull { limit_bytes: 4_194_304, .. }), "{error}");
    }
}

#[test]
fn who_is_held_back_goes_on_when_someone_waits_behind() {
    for kind in KINDS {
        let mut setup = Setup::new(kind);
        setup.tuning.unread_bytes = 1 << 20;
        let members = mesh(2, setup);
        for i in 0..40 {
            members[0].send(Rank(1), user(i, 0), vec![i as u8; 1 << 20], soon()).unwrap();
        }
        // The last comes first: everything before it must be read into the mailbox.
        for i in (0..40).rev() {
            assert_eq!(members[1].recv(Rank(0), user(i, 0), soon()).unwrap()[77], i as u8);
        }
    }
}

#[test]
fn an_abort_ends_every_wait_here_and_looks_like_a_death_elsewhere() {
    for kind in KINDS {
        let members = mesh(3, Setup::new(kind));
        let stuck = members[0].send(Rank(1), user(1, 0), vec![0u8; 64 << 20], soon()).unwrap();
        let begun = Instant::now();
        let ends = thread::scope(|scope| {
            let waits = |me: usize, peer: u32| {
                let members = &members;
                scope.spawn(move || members[me].recv(Rank(peer), user(9, 9), soon()).unwrap_err())
            };
            let (here, there) = (waits(0, 2), waits(2, 0));
            thread::scope(|inner| {
                // From several threads at once, twice each.
                for _ in 0..3 {
                    inner.spawn(|| {
                        members[0].abort();
                        members[0].abort();
                    });
                }
            });
            [here.join().unwrap(), there.join().unwrap()]
        });
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert!(matches!(ends[0], Error::Aborted { .. }), "{}", ends[0]);
        assert!(matches!(ends[1], Error::PeerDead { .. }), "{}", ends[1]);
        assert!(matches!(stuck.wait(soon()), SendState::Dropped | SendState::Sent(_)));
        assert!(!members[0].close(soon()), "an aborted communicator has nothing left to say");
    }
}

/// Memory that notes when its lease ends.
struct Noted(Vec<u8>, Arc<AtomicBool>);

impl AsRef<[u8]> for Noted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_lease_ends_when_it_has_left_or_the_communicator_fails() {
    for kind in KINDS {
        let members = mesh(2, Setup::new(kind));
        let lease = |bytes| {
            let ended = Arc::new(AtomicBool::new(false));
            let memory = Arc::new(Noted(vec![3; bytes], Arc::clone(&ended)));
            (SendBuffer::lease(memory), ended)
        };
        let (memory, ended) = lease(1 << 20);
        let ticket = members[0].send(Rank(1), user(0, 0), memory, soon()).unwrap();
        assert_eq!(members[1].recv(Rank(0), user(0, 0), soon()).unwrap()[9], 3);
        assert!(matches!(ticket.wait(soon()), SendState::Sent(_)));
        assert!(ended.load(Ordering::SeqCst), "sent, but still held");
        let leases: Vec<_> = (0..4).map(|_| lease(32 << 20)).collect();
        let mut tickets = Vec::new();
        let mut ends = Vec::new();
        for (memory, ended) in leases {
            tickets.push(members[0].send(Rank(1), user(1, 0), memory, soon()).unwrap());
            ends.push(ended);
        }
        members[0].abort();
        for (ticket, ended) in tickets.iter().zip(ends) {
            assert_ne!(ticket.wait(soon()), SendState::Pending);
            assert!(ended.load(Ordering::SeqCst), "dropped, but still held");
        }
    }
}

/// The other process of the next test: rank 1, which floods rank 0 until it is killed.
#[test]
fn flooding_process() {
    let Ok(address) = env::var("HGCT_COMM_TEST_FLOOD") else { return };
    let (kind, address) = address.split_once(' ').unwrap();
    let kind = if kind == Kind::Tcp.name() { Kind::Tcp } else { Kind::SharedMemory };
    let none = hgct_comm::Listener::none();
    let group = two(address.parse().unwrap());
    let me = Communicator::connect(&options(&group, 1, &none, Setup::new(kind))).unwrap();
    me.send(Rank(0), user(0, 0), vec![1], soon()).unwrap();
    let payload = SendBuffer::from(vec![0u8; 8 << 20]);
    while me.send(Rank(0), user(1, 0), payload.clone(), soon()).is_ok() {}
}

fn two(address: std::net::SocketAddr) -> Vec<Peer> {
    let peer = |rank, endpoints| Peer { rank: Rank(rank), host_id: "this host".into(), endpoints };
    vec![peer(0, vec![Endpoint::new(address)]), peer(1, Vec::new())]
}

fn spawn_flooder(kind: Kind, address: std::net::SocketAddr) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "flooding_process"])
        .env("HGCT_COMM_TEST_FLOOD", format!("{} {address}", kind.name()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_process_is_seen_at_once() {
    for kind in KINDS {
        let listener = listener();
        let address = listener.endpoints()[0].address;
        let mut flooder = spawn_flooder(kind, address);
        let setup = Setup::new(kind);
        let me = Communicator::connect(&options(&two(address), 0, &listener, setup)).unwrap();
        assert_eq!(me.transport_to(Rank(1)).unwrap(), kind.name());
        assert_eq!(me.recv(Rank(1), user(0, 0), soon()).unwrap()[..], [1]);
        let killed = thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let error = me.recv(Rank(1), user(9, 9), soon()).unwrap_err();
                (error, Instant::now())
            });
            flooder.kill().unwrap();
            flooder.wait().unwrap();
            let killed = Instant::now();
            let (error, seen) = waiting.join().unwrap();
            assert!(matches!(error, Error::PeerDead { .. }), "{error}");
            seen.saturating_duration_since(killed)
        });
        assert!(killed < Duration::from_secs(2), "seen after {killed:?}");
        let later = me.send(Rank(1), user(0, 1), vec![1], soon()).unwrap_err();
        assert!(matches!(later, Error::PeerDead { .. }), "{later}");
        let mut output = String::new();
        flooder.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    }
}

#[test]
fn a_drop_ends_in_time_though_the_peer_reads_nothing() {
    for kind in KINDS {
        let mut setup = Setup::new(kind);
        setup.tuning.unread_bytes = 1;
        let mut members = mesh(2, setup);
        let sender = members.pop();
        for i in 0..8 {
            sender.send(Rank(0), user(i, 0), vec![0u8; 8 << 20], Deadline::at_ns(0)).unwrap();
        }
        let begun = Instant::now();
        drop(sender);
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
}
