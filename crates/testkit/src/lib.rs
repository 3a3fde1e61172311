//! The guest's and the frontend's side of vhost-user, for tests; a dev-dependency only.
//!
//! It depends on no crate of the project, so that it stays a second opinion.

// As the files were moved here; they are documented when they are unified.
#![expect(missing_docs, clippy::new_without_default)]

pub mod chains;
pub mod descriptor;
pub mod driver;
pub mod frontend;
pub mod request;
pub mod ring;
