//! The token file.

use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use hgct_control::auth::Token;

/// A token file is small; more is something else.
const MAX_BYTES: u64 = 4096;

/// What can be wrong with a token file. The token is never part of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TokenError {
    /// It cannot be read.
    #[error("the token file {path} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no file.
    #[error("the token file {path} is not a regular file")]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// Others may read or write it.
    #[error(
        "the token file {path} has mode {mode:04o}, but must have 0600, so that nobody else can read it: chmod 600 {path}"
    )]
    Mode {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("the token file {path} belongs to user {owner}, but must be yours: copy it")]
    Owner {
        /// Which.
        path: PathBuf,
        /// Whose.
        owner: u32,
    },
    /// It holds no token.
    #[error("{path} holds no token")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: hgct_control::Error,
    },
}

/// Reads a token from a file that only its owner may read.
pub(crate) fn read_token(path: &Path) -> Result<Token, TokenError> {
    let failed = |source| TokenError::Read { path: path.to_owned(), source };
    // A FIFO in its place must not keep us waiting.
    let file =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    // The open file, not the path: nobody can change it between the look and the reading.
    let about = file.metadata().map_err(failed)?;
    if !about.is_file() {
        return Err(TokenError::NotAFile { path: path.to_owned() });
    }
    let mode = about.mode() & 0o7777;
    if mode & 0o177 != 0 {
        return Err(TokenError::Mode { path: path.to_owned(), mode });
    }
    if about.uid() != rustix::process::geteuid().as_raw() {
        return Err(TokenError::Owner { path: path.to_owned(), owner: about.uid() });
    }
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(failed)?;
    Token::parse(&text).map_err(|source| TokenError::Content { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (folder, path)
    }

    #[test]
    fn only_a_private_file_with_a_token_will_do() {
        let token = "t".repeat(40);
        let (_folder, path) = file(&format!("{token}\n"), 0o600);
        assert_eq!(read_token(&path).unwrap(), Token::parse(&token).unwrap());
        for mode in [0o640, 0o604, 0o660, 0o700, 0o644] {
            let (_folder, path) = file(&token, mode);
            let error = read_token(&path).unwrap_err();
            assert!(matches!(error, TokenError::Mode { mode: found, .. } if found == mode), "{error}");
            assert!(error.to_string().contains("chmod 600") && !error.to_string().contains(&token));
        }
        let (_folder, path) = file("short", 0o600);
        assert!(matches!(read_token(&path), Err(TokenError::Content { .. })));
        assert!(matches!(read_token(path.parent().unwrap()), Err(TokenError::NotAFile { .. })));
        assert!(matches!(read_token(&path.with_extension("missing")), Err(TokenError::Read { .. })));
    }
}
