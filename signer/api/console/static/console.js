// The console's only script. Everything but live lists and passkeys works without it.
"use strict";
