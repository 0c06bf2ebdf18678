// The console's only script: parts of pages that stay up to date, and passkeys. Everything else works without it.
"use strict";

// --- live parts: the server makes them, and answers when they have changed -------------------------------------------

const live = document.querySelector("[data-live]");

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function whenVisible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function swap(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html").body;
  const before = live.firstElementChild?.dataset ?? {};
  const after = fresh.firstElementChild?.dataset ?? {};
  if (before.state !== after.state) {  // what can be done on the page is something else now
    location.reload();
    return;
  }
  const focused = document.activeElement;
  const target = live.contains(focused) && focused.getAttribute("href");
  live.replaceChildren(...fresh.childNodes);
  if (target) live.querySelector(`a[href="${CSS.escape(target)}"]`)?.focus();
  const announce = document.querySelector("[data-announce]");
  if (announce && after.summary) announce.textContent = `Updated: ${after.summary}`;
}

async function follow() {
  let seen = live.dataset.seen;
  for (;;) {
    await whenVisible();
    const url = new URL(location.href);
    url.searchParams.set("fragment", "1");
    url.searchParams.set("wait", "50");
    url.searchParams.set("seen", seen);
    let wait = 300;
    try {
      const answer = await fetch(url, { cache: "no-store", redirect: "error", credentials: "same-origin" });
      if (answer.status === 401) {
        location.reload();
        return;
      }
      if (answer.status === 200) {
        seen = (answer.headers.get("ETag") ?? "").replaceAll('"', "");
        swap(await answer.text());
      } else {
        wait = 1000 * Number(answer.headers.get("Retry-After") ?? (answer.status === 204 ? 0.3 : 5));
      }
    } catch {
      wait = 3000;  // the service is away
    }
    await pause(wait);
  }
}

if (live) follow();

// --- passkeys: the signature of an approval --------------------------------------------------------------------------

function fromBase64url(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(binary, (letter) => letter.charCodeAt(0));
}

function toBase64url(buffer) {
  const binary = String.fromCharCode(...new Uint8Array(buffer));
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// The statement is RFC 8785 JSON whose last member is the waiver, null on the page.
function statementOf(form) {
  const until = form.elements.until?.value;
  if (!until) return form.dataset.statement;
  const waiver = JSON.stringify({ until, uses: Number(form.elements.uses.value) });
  return form.dataset.statement.replace(/"waiver":null\}$/, `"waiver":${waiver}}`);
}

// The passkeys that this page may ask for: those whose relying party is this host or a parent domain of it.
function keysHere(form) {
  const keys = form.dataset.keys.split(",").map((key) => key.split(" "));
  const here = keys.filter(([rp]) => location.hostname === rp || location.hostname.endsWith(`.${rp}`));
  return here.filter(([rp]) => rp === here[0][0]);
}

async function sign(form) {
  const keys = keysHere(form);
  const statement = new TextEncoder().encode(statementOf(form));
  const credential = await navigator.credentials.get({
    publicKey: {
      challenge: await crypto.subtle.digest("SHA-256", statement),
      rpId: keys[0][0],
      allowCredentials: keys.map(([, id]) => ({ type: "public-key", id: fromBase64url(id) })),
      userVerification: "required",
      timeout: 120000,
    },
  });
  form.elements.id.value = credential.id;
  form.elements.authenticator_data.value = toBase64url(credential.response.authenticatorData);
  form.elements.client_data.value = toBase64url(credential.response.clientDataJSON);
  form.elements.signature.value = toBase64url(credential.response.signature);
}

for (const form of document.querySelectorAll("form[data-passkey]")) {
  const problem = document.querySelector("[data-passkey-error]");
  const say = (text) => {
    problem.textContent = text;
    problem.hidden = !text;
  };
  if (!window.PublicKeyCredential || !window.isSecureContext) {
    say("This browser offers passkeys only over https, or on localhost.");
    continue;
  }
  if (keysHere(form).length === 0) {
    say(`None of your passkeys is for ${location.hostname}; open the console at the address of its rp in policy.toml.`);
    continue;
  }
  form.hidden = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    say("");
    try {
      await sign(form);
      form.submit();
    } catch (error) {
      say(`Nothing was sent: ${error.message}`);
      button.disabled = false;
    }
  });
}
