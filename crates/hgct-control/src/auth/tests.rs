use proptest::prelude::*;

use super::*;

fn token(letter: char) -> Token {
    Token::parse(&letter.to_string().repeat(32)).unwrap()
}

fn run() -> RunId {
    RunId::new("run-1").unwrap()
}

fn node() -> NodeId {
    NodeId::new("east").unwrap()
}

/// Gives all bytes, in pieces of `piece`, as the shell would read them.
fn feed(to: &mut Handshake, bytes: &[u8], piece: usize) -> Result<Option<Peer>> {
    let mut rest = bytes;
    let mut last = Ok(None);
    while !rest.is_empty() && to.wanted() > 0 {
        let (now, later) = rest.split_at(piece.min(to.wanted()).min(rest.len()));
        last = Ok(to.receive(now)?);
        rest = later;
    }
    last
}

fn pair(server: Token, client: Token) -> (Handshake, Handshake) {
    (Handshake::server(server, &run(), [1; 32]), Handshake::client(client, &node(), [2; 32]))
}

#[test]
fn both_sides_learn_whom_they_speak_to() {
    for piece in [1, 5, 1000] {
        let (mut server, mut client) = pair(token('t'), token('t'));
        assert_eq!(feed(&mut client, &server.output(), piece), Ok(None));
        let peer = Peer { run: run(), node: node() };
        assert_eq!(feed(&mut server, &client.output(), piece), Ok(Some(peer.clone())));
        assert_eq!(feed(&mut client, &server.output(), piece), Ok(Some(peer)));
        assert_eq!((server.wanted(), client.wanted()), (0, 0));
    }
}

#[test]
fn what_follows_the_handshake_stays_in_the_connection() {
    let (mut server, mut client) = pair(token('t'), token('t'));
    let mut greeting = server.output();
    greeting.extend_from_slice(b"first frame");
    assert!(client.receive(&greeting).is_err(), "more than wanted");
}

#[test]
fn a_wrong_token_is_refused_by_the_server_and_the_client_hears_why() {
    let (mut server, mut client) = pair(token('t'), token('u'));
    feed(&mut client, &server.output(), 99).unwrap();
    assert_eq!(feed(&mut server, &client.output(), 99), Err(Error::Token));
    let refusal = server.output();
    assert_eq!(refusal.len(), PREFIX + 4, "a stranger gets no proof");
    assert!(matches!(feed(&mut client, &refusal, 99), Err(Error::Refused { .. })));
}

#[test]
fn a_coordinator_without_the_token_is_refused_by_the_client() {
    // An impostor that sends the client's own proof back, or anything else.
    let (mut server, mut client) = pair(token('x'), token('t'));
    feed(&mut client, &server.output(), 99).unwrap();
    let proof = client.output();
    let mut welcome = proof[..PREFIX].to_vec();
    welcome[12] = WELCOME as u8;
    welcome.extend_from_slice(&proof[proof.len() - MAC..]);
    assert_eq!(feed(&mut client, &welcome, 99), Err(Error::Token));
}

#[test]
fn a_replayed_proof_is_refused() {
    let (mut server, mut client) = pair(token('t'), token('t'));
    feed(&mut client, &server.output(), 99).unwrap();
    let recorded = client.output();
    feed(&mut server, &recorded, 99).unwrap();
    let mut again = Handshake::server(token('t'), &run(), [3; 32]);
    again.output();
    assert_eq!(feed(&mut again, &recorded, 99), Err(Error::Token));
}

#[test]
fn a_proof_of_another_run_is_refused() {
    let mut other = Handshake::server(token('t'), &RunId::new("run-2").unwrap(), [1; 32]);
    let (mut server, mut client) = pair(token('t'), token('t'));
    feed(&mut client, &other.output(), 99).unwrap();
    server.output();
    assert_eq!(feed(&mut server, &client.output(), 99), Err(Error::Token));
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let (mut server, mut client) = pair(token('t'), token('t'));
    let mut greeting = server.output();
    greeting[8] = 9;
    let error = feed(&mut client, &greeting, 99).unwrap_err();
    assert_eq!(error, Error::Protocol { theirs: 9, ours: PROTOCOL });
    assert!(matches!(feed(&mut server, &client.output(), 99), Err(Error::Refused { .. })));
}

#[test]
fn keys_differ_by_token_run_and_purpose_and_nothing_secret_is_printed() {
    let other = RunId::new("run-2").unwrap();
    let key = Key::data(&token('t'), &run());
    assert_ne!(key, Key::data(&token('u'), &run()));
    assert_ne!(key, Key::data(&token('t'), &other));
    assert_ne!(key, Key::control(&token('t'), &run()));
    assert_eq!(format!("{key:?} {:?}", token('t')), "Key(…) Token(…)");
    assert_eq!(key.to_hex().len(), 64);
}

#[test]
fn the_mac_is_hmac_sha256() {
    // RFC 4231, test case 2.
    let mac = mac_over(b"Jefe", &[b"what do ya want ", b"for nothing?"]).finalize().into_bytes();
    assert_eq!(hex(&mac), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

#[test]
fn token_files() {
    let long = "k".repeat(32);
    assert_eq!(Token::parse(&format!("  {long}\n")).unwrap().to_file(), format!("{long}\n"));
    assert_eq!(Token::parse(&Token::from_random(&[7; 32]).to_file()).unwrap(), Token::from_random(&[7; 32]));
    for bad in ["", "short", &"k".repeat(31), &"k".repeat(1025), &format!("{long} {long}"), "ü"] {
        let error = Token::parse(bad).unwrap_err().to_string();
        assert!(bad.len() < 4 || !error.contains(bad), "the error shows the token");
    }
}

proptest! {
    #[test]
    fn a_changed_proof_is_never_accepted(at in 0usize..209, flip in 1u8..) {
        let (mut server, mut client) = pair(token('t'), token('t'));
        feed(&mut client, &server.output(), 99).unwrap();
        let mut proof = client.output();
        prop_assert_eq!(proof.len(), 209);
        proof[at] ^= flip;
        prop_assert!(!matches!(feed(&mut server, &proof, 99), Ok(Some(_))));
    }

    #[test]
    fn a_changed_greeting_or_welcome_is_never_accepted(in_greeting: bool, at in 0usize..177, flip in 1u8..) {
        let (mut server, mut client) = pair(token('t'), token('t'));
        let mut greeting = server.output();
        if in_greeting {
            greeting[at] ^= flip;
        }
        let refused = feed(&mut client, &greeting, 99).is_err();
        if !refused && matches!(feed(&mut server, &client.output(), 99), Ok(Some(_))) {
            let mut welcome = server.output();
            let at = at % welcome.len();
            welcome[at] ^= if in_greeting { 0 } else { flip };
            prop_assert!(!matches!(feed(&mut client, &welcome, 99), Ok(Some(_))));
        }
    }

    #[test]
    fn random_bytes_never_panic_and_are_never_accepted(bytes in prop::collection::vec(any::<u8>(), 0..600), piece in 1usize..300) {
        let (mut server, mut client) = pair(token('t'), token('t'));
        prop_assert!(!matches!(feed(&mut server, &bytes, piece), Ok(Some(_))));
        prop_assert!(!matches!(feed(&mut client, &bytes, piece), Ok(Some(_))));
    }
}
