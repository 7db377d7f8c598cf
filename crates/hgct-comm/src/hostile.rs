//! Strangers and misbehaving peers, over real connections.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hgct_core::ids::{Generation, Rank, RunId};
use proptest::prelude::*;

use crate::handshake::{Handshake, Identity, Offer, Progress};
use crate::key::run_digest;
use crate::wire::{FrameKind, HEADER_BYTES, Header};
use crate::{
    Communicator, ConnectOptions, Deadline, Error, Guard, GuardOptions, Listener, Peer, Refusal, Result,
    RunKey, Tag, TagKind, Tuning,
};

const GENERATION: Generation = Generation { epoch: 3, sequence: 1 };

fn run() -> RunId {
    RunId::new("hostile").unwrap()
}

fn key() -> RunKey {
    RunKey::derive(b"token", &run())
}

fn listener() -> Listener {
    Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap()
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

/// Rank `me` of two, of which rank 0 listens at `address`.
fn options(me: u32, listener: &Listener, address: SocketAddr) -> ConnectOptions<'_> {
    let peer = |rank, endpoints| Peer { rank: Rank(rank), host_id: String::new(), endpoints };
    ConnectOptions {
        group: vec![peer(0, vec![crate::Endpoint::new(address)]), peer(1, Vec::new())],
        me: Rank(me),
        generation: GENERATION,
        run: run(),
        key: key(),
        listener,
        deadline: soon(),
        shared_memory: false,
        test_delay_ns: 0,
        tuning: Tuning::default(),
    }
}

/// The handshake of rank 1 with rank 0.
fn member() -> Handshake {
    let identity = Identity {
        me: Rank(1),
        members: vec![Rank(0), Rank(1)],
        generation: GENERATION,
        run: run_digest(&run()),
        key: key(),
    };
    Handshake::dial(identity, Rank(0), [1; 32])
}

/// An authenticated connection in the hands of a peer that then does what it likes.
fn rogue(address: SocketAddr) -> TcpStream {
    let mut handshake = member();
    let mut stream = TcpStream::connect(address).unwrap();
    loop {
        let output = std::mem::take(handshake.output());
        stream.write_all(&output).unwrap();
        let mut bytes = vec![0; handshake.wanted()];
        stream.read_exact(&mut bytes).unwrap();
        match handshake.receive(&bytes).unwrap() {
            Progress::MayOffer(_) => handshake.offer(Offer::NONE),
            Progress::Done(..) => return stream,
            _ => {}
        }
    }
}

/// Rank 0, connected with a rogue rank 1.
fn victim() -> (Communicator, TcpStream) {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    thread::scope(|scope| {
        let rogue = scope.spawn(move || rogue(address));
        let victim = Communicator::connect(&options(0, &listener, address)).unwrap();
        (victim, rogue.join().unwrap())
    })
}

fn header(bytes: u64, sequence: u64) -> Header {
    Header {
        kind: FrameKind::Data,
        tag: Tag::new(TagKind::User, 0, 0, sequence),
        run: crate::wire::u32_at(&run_digest(&run()), 0),
        generation: GENERATION,
        sequence,
        bytes,
        queued_ns: 0,
    }
}

/// What rank 0 says when the rogue has sent `bytes` and closed.
fn reaction(bytes: &[u8]) -> Error {
    let (victim, mut rogue) = victim();
    // The victim may close first.
    let _ = rogue.write_all(bytes);
    drop(rogue);
    let begun = Instant::now();
    let error = victim.recv(Rank(1), Tag::new(TagKind::User, 9, 9, 9), soon()).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "seen only after {:?}", begun.elapsed());
    assert_eq!(error.culprit(), Some(Rank(1)), "{error}");
    error
}

#[test]
fn strangers_neither_pass_nor_hold_anyone_up() {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    let begun = Instant::now();
    // More of them than there are slots; most say nothing at all.
    let mut strangers: Vec<_> = (0..150).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut oversize = *b"hgct\x01\x00\x01\x00\xff\xff\xff\xff";
    strangers[0].write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    strangers[1].write_all(&oversize).unwrap();
    oversize[4] = 9;
    strangers[2].write_all(&oversize).unwrap();
    strangers[3].write_all(&[0; 4096]).unwrap();
    let members = thread::scope(|scope| {
        let other = scope.spawn(|| Communicator::connect(&options(1, &Listener::none(), address)));
        let me = Communicator::connect(&options(0, &listener, address));
        [me.unwrap(), other.join().unwrap().unwrap()]
    });
    assert!(begun.elapsed() < Duration::from_secs(3), "held up for {:?}", begun.elapsed());
    let tag = Tag::new(TagKind::User, 0, 0, 0);
    members[1].send(Rank(0), tag, vec![5], soon()).unwrap();
    assert_eq!(members[0].recv(Rank(1), tag, soon()).unwrap()[..], [5]);
}

#[test]
fn a_wrong_key_is_a_typed_error_and_hurts_nobody_else() {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    thread::scope(|scope| {
        let me = scope.spawn(|| Communicator::connect(&options(0, &listener, address)));
        let none = Listener::none();
        let mut wrong = options(1, &none, address);
        wrong.key = RunKey::derive(b"another token", &run());
        let error = Communicator::connect(&wrong).unwrap_err();
        assert!(matches!(error, Error::WrongKey { .. }), "{error}");
        let mut fenced = options(1, &none, address);
        fenced.generation = Generation { epoch: 3, sequence: 0 };
        let error = Communicator::connect(&fenced).unwrap_err();
        let refusal = Refusal::Generation { theirs: GENERATION };
        assert!(matches!(error, Error::Refused { refusal: r, .. } if r == refusal), "{error}");
        let other = Communicator::connect(&options(1, &none, address)).unwrap();
        me.join().unwrap().unwrap().abort();
        other.abort();
    });
}

#[test]
fn a_group_that_stays_incomplete_says_who_is_missing_and_what_came_instead() {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    let mut stranger = TcpStream::connect(address).unwrap();
    stranger.write_all(b"what is this port for?").unwrap();
    let mut options = options(0, &listener, address);
    options.deadline = Deadline::after(Duration::from_millis(100));
    let begun = Instant::now();
    let error = Communicator::connect(&options).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let text = error.to_string();
    assert!(text.contains("rank 1") && text.contains("not this protocol"), "{text}");
    assert!(matches!(error, Error::Incomplete { missing, .. } if missing == [Rank(1)]));
}

#[test]
fn a_peer_that_dies_in_a_message_is_dead() {
    let mut bytes = header(1 << 20, 0).encode().to_vec();
    bytes.extend(vec![0; 300_000]);
    let error = reaction(&bytes);
    assert!(matches!(error, Error::PeerDead { .. }), "{error}");
    for cut in [0, 1, HEADER_BYTES - 1, HEADER_BYTES] {
        let error = reaction(&bytes[..cut]);
        assert!(matches!(error, Error::PeerDead { .. }), "{error}");
    }
}

#[test]
fn frames_that_are_not_allowed_end_the_connection() {
    let broken = |change: &dyn Fn(&mut Header)| {
        let mut header = header(0, 0);
        change(&mut header);
        let error = reaction(&header.encode());
        assert!(matches!(error.root(), Error::Protocol { .. }), "{error}");
        error.root().to_string()
    };
    let text = broken(&|header| header.bytes = u64::MAX);
    assert!(text.contains("1073741824"), "{text}");
    let text = broken(&|header| header.generation.sequence = 0);
    assert!(text.contains("generation 3.0") && text.contains("generation 3.1"), "{text}");
    assert!(broken(&|header| header.run ^= 1).contains("another run"));
    assert!(broken(&|header| header.sequence = 1).contains("frame 1 where frame 0"));
    let mut replayed = header(4, 0).encode().to_vec();
    replayed.extend([0; 4]);
    let again = replayed.clone();
    replayed.extend(again);
    assert!(reaction(&replayed).root().to_string().contains("frame 0 where frame 1"));
}

/// Rank 0's door while nobody is expected, and what is told of those who come.
fn guarded(listener: &Listener) -> (Guard, std::sync::mpsc::Receiver<String>) {
    let (told, heard) = std::sync::mpsc::channel();
    let members = vec![Rank(0), Rank(1)];
    let options =
        GuardOptions { listener, me: Rank(0), members, generation: GENERATION, run: run(), key: key() };
    let guard = Guard::start(options, move |_, why| drop(told.send(why.to_owned()))).unwrap();
    (guard, heard)
}

/// Sees a connection closed, whatever is said before.
fn is_closed(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let end = std::io::copy(stream, &mut std::io::sink());
    assert!(!end.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "it stays open");
}

#[test]
fn whoever_knocks_while_nobody_is_expected_is_refused_and_told_of() {
    const PATIENCE: Duration = Duration::from_secs(5);
    let listener = listener();
    let address = listener.endpoints()[0].address;
    let (guard, heard) = guarded(&listener);
    for (bytes, wanted) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "not this protocol"),
        (b"hgct\x01\x00\x01\x00\xff\xff\xff\xff", "at most"),
        (b"hgct\x09\x00\x01\x00\x58\x00\x00\x00", "version 9"),
        (b"", "did not prove itself"),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        let _ = stream.write_all(bytes);
        is_closed(&mut stream);
        let why = heard.recv_timeout(PATIENCE).unwrap();
        assert!(why.contains(wanted), "{wanted}: {why}");
    }
    let none = Listener::none();
    let mut wrong = options(1, &none, address);
    wrong.key = RunKey::derive(b"another token", &run());
    let error = Communicator::connect(&wrong).unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    assert!(heard.recv_timeout(PATIENCE).unwrap().contains("does not have the key"));

    // A member comes again with the key, and is recorded; the recording then proves nothing.
    let mut handshake = member();
    let mut stream = TcpStream::connect(address).unwrap();
    let mut recording = std::mem::take(handshake.output());
    stream.write_all(&recording).unwrap();
    let mut challenge = [0; 44];
    stream.read_exact(&mut challenge).unwrap();
    assert_eq!(handshake.receive(&challenge).unwrap(), Progress::Wait);
    let proof = std::mem::take(handshake.output());
    stream.write_all(&proof).unwrap();
    recording.extend(proof);
    drop(stream);
    // It proved itself and left: seen at the guard's next read or write, whichever comes first.
    let why = heard.recv_timeout(PATIENCE).unwrap();
    assert!(!why.contains("does not have the key"), "{why}");
    let mut stream = TcpStream::connect(address).unwrap();
    let _ = stream.write_all(&recording);
    is_closed(&mut stream);
    assert!(heard.recv_timeout(PATIENCE).unwrap().contains("does not have the key"));

    // One who is a generation further comes again until this rank is there too.
    thread::scope(|scope| {
        let next = Generation { sequence: GENERATION.sequence + 1, ..GENERATION };
        let further = scope.spawn(move || {
            let none = Listener::none();
            Communicator::connect(&ConnectOptions { generation: next, ..options(1, &none, address) })
        });
        assert!(heard.recv_timeout(Duration::from_millis(100)).is_err(), "a member is told of");
        drop(guard);
        let me =
            Communicator::connect(&ConnectOptions { generation: next, ..options(0, &listener, address) });
        me.unwrap().abort();
        further.join().unwrap().unwrap().abort();
    });
}

#[test]
fn a_flood_at_the_door_is_not_told_for_ever() {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    let (guard, heard) = guarded(&listener);
    for _ in 0..150 {
        let mut stream = TcpStream::connect(address).unwrap();
        let _ = stream.write_all(&[0; 64]);
        is_closed(&mut stream);
    }
    drop(guard);
    let told: Vec<String> = heard.iter().collect();
    assert_eq!(told.len(), 100);
    assert!(told[99].contains("more of them are not told"), "{}", told[99]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]
    #[test]
    fn damaged_streams_end_in_an_error(
        at in 0usize..3 * (HEADER_BYTES + 40),
        mask in 1u8..=255,
        tail in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = Vec::new();
        for sequence in 0..3 {
            bytes.extend(header(40, sequence).encode());
            bytes.extend([7; 40]);
        }
        bytes[at] ^= mask;
        bytes.extend(tail);
        let error = reaction(&bytes);
        let root = error.root();
        let typed = matches!(root, Error::PeerDead { .. } | Error::Protocol { .. } | Error::PeerLeft { .. });
        prop_assert!(typed, "{root}");
    }
}

#[test]
fn group_lists_that_contradict_themselves_are_refused() {
    let listener = listener();
    let address = listener.endpoints()[0].address;
    let refused = |change: &dyn Fn(&mut ConnectOptions<'_>)| {
        let mut options = options(0, &listener, address);
        change(&mut options);
        let result: Result<_> = Communicator::connect(&options);
        assert!(matches!(result, Err(Error::Options { .. })), "{result:?}");
    };
    refused(&|options| options.me = Rank(7));
    refused(&|options| options.group[1].rank = Rank(0));
    refused(&|options| options.tuning.ring_bytes = 5000);
}
