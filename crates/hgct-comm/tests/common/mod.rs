//! Groups of communicators inside one process, for the tests of this crate.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ops::Deref;
use std::thread;
use std::time::Duration;

use hgct_comm::{
    Communicator, ConnectOptions, Deadline, Listener, Peer, Result, RunKey, Tag, TagKind, Tuning,
};
use hgct_core::ids::{Generation, Rank, RunId};

pub(crate) const GENERATION: Generation = Generation { epoch: 1, sequence: 4 };

/// Which transport a group uses. Every conformance test runs on all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    SharedMemory,
}

pub(crate) const KINDS: [Kind; 2] = [Kind::Tcp, Kind::SharedMemory];

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::SharedMemory => "shared-memory",
        }
    }
}

/// How a group is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) kind: Kind,
    pub(crate) delay_ns: u64,
    pub(crate) tuning: Tuning,
}

impl Setup {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, delay_ns: 0, tuning: Tuning::default() }
    }
}

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

pub(crate) fn within_ms(ms: u64) -> Deadline {
    Deadline::after(Duration::from_millis(ms))
}

pub(crate) fn user(a: u32, step: u64) -> Tag {
    Tag::new(TagKind::User, a, 0, step)
}

pub(crate) fn run() -> RunId {
    RunId::new("test").unwrap()
}

pub(crate) fn key() -> RunKey {
    RunKey::derive(b"the token of the tests", &run())
}

pub(crate) fn listener() -> Listener {
    Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap()
}

pub(crate) fn group(listeners: &[Listener]) -> Vec<Peer> {
    let peer = |(rank, listener): (usize, &Listener)| Peer {
        rank: Rank(rank as u32),
        host_id: "this host".into(),
        endpoints: listener.endpoints(),
    };
    listeners.iter().enumerate().map(peer).collect()
}

pub(crate) fn options<'a>(
    group: &[Peer],
    me: u32,
    listener: &'a Listener,
    setup: Setup,
) -> ConnectOptions<'a> {
    ConnectOptions {
        group: group.to_vec(),
        me: Rank(me),
        generation: GENERATION,
        run: run(),
        key: key(),
        listener,
        deadline: soon(),
        shared_memory: setup.kind == Kind::SharedMemory,
        test_delay_ns: setup.delay_ns,
        tuning: setup.tuning,
    }
}

/// Connects each rank on a thread of its own.
pub(crate) fn try_mesh(ranks: u32, setup: Setup) -> Vec<Result<Communicator>> {
    let listeners: Vec<_> = (0..ranks).map(|_| listener()).collect();
    let group = group(&listeners);
    thread::scope(|scope| {
        let connecting: Vec<_> = (0..ranks)
            .map(|me| {
                let (group, listener) = (&group, &listeners[me as usize]);
                scope.spawn(move || Communicator::connect(&options(group, me, listener, setup)))
            })
            .collect();
        connecting.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub(crate) fn mesh(ranks: u32, setup: Setup) -> Members {
    Members(try_mesh(ranks, setup).into_iter().map(Result::unwrap).collect())
}

/// The members of a group. They leave together, so that none waits for another's goodbye.
pub(crate) struct Members(Vec<Communicator>);

impl Members {
    /// Takes the last member out.
    pub(crate) fn pop(&mut self) -> Communicator {
        self.0.pop().unwrap()
    }
}

impl Deref for Members {
    type Target = [Communicator];

    fn deref(&self) -> &[Communicator] {
        &self.0
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        if !thread::panicking() {
            each(&self.0, |member| member.close(within_ms(500)));
        }
    }
}

/// Runs `body` for every member at once and returns what each gave, in rank order.
pub(crate) fn each<T: Send>(members: &[Communicator], body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let body = &body;
        let running: Vec<_> = members.iter().map(|member| scope.spawn(move || body(member))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
