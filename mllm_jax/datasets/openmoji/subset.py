"""The bases of the configurations `quickstart` and `study`: images clear at 64 pixels, six categories of similar size.

Both leave out activities, a category by use and not by appearance; names that contain others ("bird" next to "duck");
and images that differ only in their text. `study` adds persons with two genders that look alike in a cell of a scene:
at 32 pixels and equal tone they differ by less than 0.09 (root mean square; black to white is 1).
"""

from __future__ import annotations

_PEOPLE = """
elf, merperson, construction worker, detective, judge, police officer, teacher, singer, scientist, guard, office worker,
health worker, technologist, older person, person with beard, person with crown, person with veil, person in tuxedo,
person feeding baby, pregnant person, farmer, firefighter, factory worker, mechanic, pilot, cook, artist, student,
zombie, genie
"""

_ALIKE = """
superhero, fairy, mage, vampire, person with red hair, person with blond hair, person in steamy room, person getting
haircut, person raising hand, person tipping hand, person frowning, person shrugging, deaf person, person bouncing ball,
person juggling, astronaut
"""

_HANDS = """
thumbs up, thumbs down, raised fist, oncoming fist, waving hand, raised hand, vulcan salute, palm down hand, palm up
hand, ok hand, pinching hand, victory hand, crossed fingers, love-you gesture, sign of the horns, call me hand,
writing hand, nail polish, selfie, backhand index pointing left, backhand index pointing right, backhand index
pointing up, clapping hands, raising hands, heart hands, folded hands, flexed biceps, leg, foot, ear, nose
"""

_ANIMALS = """
monkey, gorilla, dog, poodle, fox, raccoon, cat, lion, tiger, leopard, zebra, cow, pig, ram, goat, camel, giraffe,
elephant, rhinoceros, hippopotamus, mouse, rabbit, chipmunk, hedgehog, bat, bear, koala, panda, sloth, otter, skunk,
kangaroo, turkey, rooster, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, frog, crocodile, turtle, snake,
whale, dolphin, shark, octopus, snail, butterfly, ant, honeybee, spider, scorpion, cactus, palm tree, sunflower,
tulip, badger, beaver, beetle, bison, boar, cricket, deer, dodo, donkey, goose, hamster, jellyfish, lizard, llama,
mammoth, polar bear, seal, rose, hibiscus, wolf, dove, unicorn, mushroom
"""

_FOOD = """
grapes, watermelon, lemon, banana, pineapple, mango, red apple, green apple, pear, peach, cherries, strawberry, kiwi
fruit, tomato, coconut, avocado, eggplant, carrot, ear of corn, hot pepper, bell pepper, cucumber, broccoli, garlic,
onion, peanuts, bread, croissant, pretzel, bagel, pancakes, waffle, cheese wedge, bacon, hamburger, french fries,
pizza, hot dog, taco, egg, popcorn, sushi, soft ice cream, doughnut, cookie, birthday cake, cupcake, lollipop, honey
pot, glass of milk, hot beverage, teapot, wine glass, cocktail glass, beer mug, crab, lobster, shrimp, fork and knife,
chopsticks, burrito, sandwich, dumpling, spaghetti, curry rice, rice ball, blueberries, olive, potato, tangerine,
bubble tea, poultry leg, meat on bone, pie, candy, chocolate bar, shaved ice, oyster, pea pod, bento box
"""

_OBJECTS = """
glasses, necktie, t-shirt, jeans, scarf, gloves, socks, dress, bikini, handbag, backpack, running shoe, crown, top
hat, graduation cap, ring, bell, guitar, trumpet, violin, drum, saxophone, telephone, laptop, keyboard, camera,
television, light bulb, candle, open book, scroll, envelope, package, pencil, paintbrush, scissors, key, hammer, axe,
screwdriver, gear, magnet, ladder, syringe, pill, microscope, telescope, door, bed, chair, toilet, bathtub, broom,
bucket, soap, toothbrush, coin, money bag, briefcase, bomb, wrench, shovel, microphone, trombone, flute, harp,
headphone, dagger, books, floppy disk, printer, radio
"""

_TRAVEL = """
volcano, mount fuji, desert island, stadium, hut, house, hospital, factory, castle, tokyo tower, statue of liberty,
church, mosque, fountain, tent, ferris wheel, roller coaster, carousel horse, circus tent, locomotive, tram, bus,
ambulance, fire engine, police car, taxi, delivery truck, tractor, motorcycle, bicycle, skateboard, stop sign, anchor,
sailboat, canoe, passenger ship, airplane, parachute, helicopter, satellite, rocket, flying saucer, luggage, hourglass
done, alarm clock, crescent moon, full moon, sun, ringed planet, star, cloud, tornado, rainbow, umbrella, snowflake,
snowman, fire, droplet, water wave, compass, mountain, school, hotel, bank, monorail, ferry, racing car, speedboat,
kick scooter, sunrise, cityscape
"""

_SMILEYS = """
grinning face, face with tears of joy, rolling on the floor laughing, upside-down face, melting face, winking face,
smiling face with halo, smiling face with hearts, smiling face with heart-eyes, star-struck, face blowing a kiss, face
savoring food, zany face, money-mouth face, shushing face, thinking face, zipper-mouth face, neutral face, face in
clouds, lying face, sleeping face, face with medical mask, face with thermometer, face with head-bandage, nauseated
face, face vomiting, sneezing face, hot face, cold face, exploding head, cowboy hat face, partying face, disguised
face, smiling face with sunglasses, nerd face, face with monocle, astonished face, pleading face, loudly crying face,
face screaming in fear, yawning face, enraged face, smiling face with horns, skull, pile of poo, clown face, ogre,
goblin, ghost, alien, robot, see-no-evil monkey, hear-no-evil monkey, speak-no-evil monkey, red heart, broken heart,
blue heart, green heart, heart with arrow, heart with ribbon
"""


def bases(config: str) -> tuple[str, ...]:
    """Returns the bases of "quickstart" or "study", grouped by category and in a fixed order."""
    groups = (_PEOPLE, _HANDS, _ANIMALS, _FOOD, _OBJECTS, _TRAVEL, _SMILEYS)
    text = ",".join(groups if config == "quickstart" else (_ALIKE, *groups))
    return tuple(" ".join(name.split()) for name in text.split(","))
