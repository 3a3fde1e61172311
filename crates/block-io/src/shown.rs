//! Showing a path that others have chosen: a header's author could otherwise forge log lines and
//! send commands to a terminal.

use std::fmt::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// [`Path::display`] for messages and logs: what is not printable is escaped as in a Rust literal.
pub trait Shown {
    /// The path in one line, without control characters.
    fn shown(&self) -> ShownPath<'_>;
}

impl Shown for Path {
    fn shown(&self) -> ShownPath<'_> {
        ShownPath(self)
    }
}

/// See [`Shown::shown`].
#[derive(Clone, Copy, Debug)]
pub struct ShownPath<'a>(&'a Path);

impl fmt::Display for ShownPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
            for char in chunk.valid().chars() {
                match is_harmless(char) {
                    true => f.write_char(char)?,
                    false => write!(f, "{}", char.escape_default())?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

/// `path` as an argument that is safe to paste into a shell; `PATH` if there is none.
#[must_use]
pub fn argument(path: &Path) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || "_@%+=:,./-".contains(char);
    match path.to_str() {
        Some(text) if text.chars().all(plain) => text.to_owned(),
        Some(text) if text.chars().all(is_harmless) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => "PATH".to_owned(),
    }
}

/// Neither a control character (C0, DEL, C1) nor one that breaks lines or reorders text.
fn is_harmless(char: char) -> bool {
    let moves = matches!(char,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !char.is_control() && !moves
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn an_argument_is_one_word_of_a_shell() {
        for (path, argument) in [
            ("/srv/base-1.img", "/srv/base-1.img"),
            ("/x; rm -rf $HOME", "'/x; rm -rf $HOME'"),
            ("it's", r"'it'\''s'"),
            ("a\nb", "PATH"),
        ] {
            assert_eq!(super::argument(Path::new(path)), argument);
        }
    }

    #[test]
    fn a_path_is_shown_in_one_harmless_line() {
        for (path, shown) in [
            (&b"/srv/a b/\xc3\xa4.img"[..], "/srv/a b/\u{e4}.img"),
            (b"x\nERROR queue 0:\t\x7f", "x\\nERROR queue 0:\\t\\u{7f}"),
            (b"\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
            ("\u{9b}2J\u{202e}gpj".as_bytes(), "\\u{9b}2J\\u{202e}gpj"),
            (b"a\xff\xc3z", "a\\xff\\xc3z"),
        ] {
            assert_eq!(Path::new(OsStr::from_bytes(path)).shown().to_string(), shown);
        }
    }
}
